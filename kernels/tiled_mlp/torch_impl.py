"""The position-wise half of a block, tile by tile of tokens, with PyTorch's operators.

With n = rms_norm(x), h = n gate_up^T, a = silu(h_gate) h_up, y = x + a down^T, for each tile

    da = dy down,  ddown += dy^T a,  dh from da and h,  dgate_up += dh^T n,  dn = dh gate_up,  dx = dy + (dx from dn)

Five products are left to backward beside the one that computes h again.
"""

import torch
from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.linear_cross_entropy.loop import HALVES, multiply
from longtrain.kernels.rms_norm import torch_impl as norms
from longtrain.kernels.swiglu import torch_impl as gates


def forward(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, eps: float, tile: int) -> Tensor:
    """y [n, D]; x [n, D]."""
    out, gain = torch.empty_like(x), norm.to(norms.state_dtype(x, norm))
    for rows in launching.tiles(x.shape[0], tile, x.device):
        normal, _ = norms.forward(x[rows], gain, eps=eps)
        inner = gates.forward(normal @ gate_up.t())
        torch.addmm(x[rows], inner, down.t(), out=out[rows])
    return out


def backward(
    dy: Tensor, x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, eps: float, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, norm, gate_up and down, each like its tensor; dy and x [n, D]."""
    dx, wide = torch.empty_like(x), norms.state_dtype(x, norm)
    gain = norm.to(wide)
    dnorm, dgate_up, ddown = (torch.zeros_like(weight, dtype=wide) for weight in (norm, gate_up, down))
    for rows in launching.tiles(x.shape[0], tile, x.device):
        normal, r = norms.forward(x[rows], gain, eps=eps)
        hidden = normal @ gate_up.t()
        _add_product(ddown, dy[rows].t(), gates.forward(hidden))
        hidden = gates.backward(dy[rows] @ down, hidden)
        _add_product(dgate_up, hidden.t(), normal)
        part, dgain = norms.backward(hidden @ gate_up, x[rows], gain, r)
        torch.add(part, dy[rows], out=dx[rows])
        if dgain is not None:
            dnorm += dgain
    return dx, dnorm.to(norm.dtype), dgate_up.to(gate_up.dtype), ddown.to(down.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, summed in total's dtype."""
    if a.dtype in HALVES and a.device.type == "cpu":  # which has no product of halves with a float32 result
        a, b = a.to(total.dtype), b.to(total.dtype)
    multiply(a, b, total, add=True)
