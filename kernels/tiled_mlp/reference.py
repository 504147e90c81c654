"""The position-wise half of a block as its papers write it, all tokens at once: it defines what is right."""

from torch import Tensor

from longtrain.kernels.rms_norm import reference as norms
from longtrain.kernels.swiglu import reference as gates


def mlp(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, eps: float) -> Tensor:
    """x [..., D], norm [D], gate_up [2 M, D], down [D, M] -> [..., D]; autograd differentiates it."""
    normal = norms.rms_norm(x, norm, eps=eps)
    return x + gates.swiglu(normal @ gate_up.T) @ down.T
