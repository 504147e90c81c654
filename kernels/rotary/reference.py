"""Rotary embedding as products of complex numbers, in plain PyTorch: it defines what is right."""

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, *, base: float) -> Tensor:
    """x [B, T, H, K], positions int64 [T] -> [B, T, H, K] in x's dtype: ``(x_i + j x_{i + K/2}) e^{j angle_i}``."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = x.shape[3] // 2
    rates = base ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    angles = positions.to(torch.float64)[:, None] * rates
    turn = torch.polar(torch.ones_like(angles), angles).to(
        torch.complex128 if dtype == torch.float64 else torch.complex64
    )
    turned = torch.complex(*x.to(dtype).chunk(2, dim=-1)) * turn[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)
