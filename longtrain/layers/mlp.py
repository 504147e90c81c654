"""The position-wise half of a block."""

from torch import Tensor, nn

from longtrain.kernels import swiglu


class SwiGLU(nn.Module):
    """Gated feed-forward layer, ``down(silu(gate(x)) * up(x))`` ("GLU Variants Improve Transformer", equation 6).

    x ``[B, T_w, D]`` -> ``[B, T_w, D]``. Gate and up are one matrix, so that x is read once.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x)))
