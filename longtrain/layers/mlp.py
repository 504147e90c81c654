"""The position-wise half of a block."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """Gated feed-forward layer, ``down(silu(gate(x)) * up(x))`` ("GLU Variants Improve Transformer", equation 6).

    x ``[B, T_w, D]`` -> ``[B, T_w, D]``. Gate and up are one matrix, so that x is read once.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(_GatedSiLU.apply(self.gate_up(x)))


class _GatedSiLU(torch.autograd.Function):
    """``silu(gate) * up`` of ``[..., 2 * hidden]``, gate first; keeps its input only, and computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (dy,) = gradients
        gate, up = gate_up.chunk(2, dim=-1)
        # Both halves are written where they belong: autograd's own would be made apart and then copied together.
        result = torch.empty_like(gate_up)
        dgate, dup = result.chunk(2, dim=-1)
        torch.mul(dy, F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=dgate)
        return result
