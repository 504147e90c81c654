"""The gated unit around a mixing of tokens that Mega and CHELA share: what is mixed, and what becomes of it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedUnit(nn.Module):
    """``y = phi * (silu(W_h x' + U_h (gamma * o) + b_h) - x)``, where o mixes values v by queries q and keys k.

    "Mega: Moving Average Equipped Gated Attention", equations 7 to 14, with x' a smoothed x: a shared ``z = silu(W_z x'
    + b_z)`` gives ``q = kappa_q * z + mu_q`` and ``k = kappa_k * z + mu_k``; ``v = silu(W_v x + b_v)``; ``gamma =
    silu(W_gamma x' + b_gamma)`` and ``phi = sigmoid(W_phi x' + b_phi)``. The residual of the block adds y, so that x,
    here the normalised input of the layer, is subtracted where the paper has ``phi * h + (1 - phi) * x``.
    """

    query_width: int  # z
    value_width: int  # v

    def make_unit(self, width: int, query_width: int, value_width: int) -> None:
        """Make the weights, for a model of a width."""
        self.query_width, self.value_width = query_width, value_width
        self.values = nn.Linear(width, value_width)
        # From x': z, gamma, phi, and what the output adds to.
        self.gates = nn.Linear(width, query_width + value_width + 2 * width)
        for linear in (self.values, self.gates):
            nn.init.zeros_(linear.bias)
        self.query_scale, self.key_scale = (nn.Parameter(torch.ones(query_width)) for _ in range(2))
        self.query_shift, self.key_shift = (nn.Parameter(torch.zeros(query_width)) for _ in range(2))
        self.out = nn.Linear(value_width, width, bias=False)

    def open_unit(self, x: Tensor, smooth: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k ``[B, T_w, z]``, v ``[B, T_w, v]``, and the gates that `close_unit` needs."""
        z, gates = self.gates(smooth).split((self.query_width, self.value_width + 2 * x.shape[-1]), dim=-1)
        z = F.silu(z)
        q, k = z * self.query_scale + self.query_shift, z * self.key_scale + self.key_shift
        return q.to(z.dtype), k.to(z.dtype), F.silu(self.values(x)), gates

    def close_unit(self, x: Tensor, o: Tensor, gates: Tensor) -> Tensor:
        """x ``[B, T_w, D]``, o ``[B, T_w, v]`` -> y ``[B, T_w, D]``."""
        width = x.shape[-1]
        reset, update, smooth = gates.split((self.value_width, width, width), dim=-1)
        candidate = F.silu(smooth + self.out(F.silu(reset) * o))
        return torch.sigmoid(update) * (candidate - x)
