"""What recurrences share whose gates depend on the token: decays by step sizes, keys of length 1, strengths."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels import rms_norm
from longtrain.layers.recurrence import state_dtype

STEPS = (0.001, 0.1)  # first step sizes lie between these


class SelectiveDecay(nn.Module):
    """``dt_t = softplus(x_t + dt_bias)``, ``log_decay_t = -exp(A_log) * dt_t``, which is below 0.

    The decay of "Transformers are SSMs" (section 7.1, with A a number per head), which "Gated Delta Networks" (section
    3.3) takes over, and "Kimi Linear" with a step size per channel. First values as in Mamba2's code: A between 1 and
    16, dt between 0.001 and 0.1 where x is 0, so that heads forget within ten tokens or within a thousand.

    Args:
        heads: H. width: channels of a head that each have their own step size; None: one step size per head.
    """

    def __init__(self, heads: int, width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.width = width
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        low, high = (math.log(step) for step in STEPS)
        step = torch.empty(heads * (width or 1)).uniform_(low, high).exp()
        self.dt_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x ``[B, T_w, H]`` or, with a width, ``[B, T_w, H * width]``.

        Returns:
            dt and log_decay, each ``[B, T_w, H]`` or ``[B, T_w, H, width]``, in float32 (float64 for float64).
        """
        dtype = state_dtype(x.dtype)
        step = F.softplus(x.to(dtype) + self.dt_bias.to(dtype))
        rate = self.A_log.to(dtype).exp()
        if self.width is not None:
            step, rate = step.unflatten(-1, (self.heads, self.width)), rate[:, None]
        return step, -rate * step


def unit(x: Tensor) -> Tensor:
    """x ``[..., K]`` divided by its length over K, ``x / sqrt(|x|^2 + 1e-6)``, in x's dtype.

    By the norm's operator, whose backward keeps x and a number for each length, no float32 copies of q and k.
    """
    return rms_norm(x, eps=1e-6 / x.shape[-1]) * x.shape[-1] ** -0.5


def strength(x: Tensor) -> Tensor:
    """sigmoid(x) in float32 (float64 for float64): how much of what a key held is replaced."""
    return torch.sigmoid(x.to(state_dtype(x.dtype)))
