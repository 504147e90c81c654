"""The gate of a gated feed-forward layer: the public operator."""

from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.swiglu import operators, reference

__all__ = ["swiglu"]


def swiglu(gate_up: Tensor, *, backend: str = "auto") -> Tensor:
    """``silu(gate) * up`` of gate and up side by side ("GLU Variants Improve Transformer", Shazeer 2020, equation 5).

    gate_up [..., 2 M], gate first -> [..., M] in its dtype. Backward keeps gate_up only and computes silu again.

    backend: "auto", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    Raises ValueError naming the argument for anything else: shapes, dtypes, backends.
    """
    checks.floating_channels("gate_up", gate_up, "[..., 2 M]")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up: got shape {tuple(gate_up.shape)}, expected [..., 2 M]")
    if choose_backend("swiglu", backend, device=gate_up.device) == "reference":
        return reference.swiglu(gate_up)
    return operators.forward(gate_up)
