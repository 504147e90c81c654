"""Rotary position embedding by explicit positions, so that it is right for any shard of any packed sequence."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, *, base: float = 10_000.0) -> Tensor:
    """Rotate each pair of channels by an angle that grows with the token's position.

    "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 34, with channel i paired with channel
    i + K/2 (the order that open Llama weights use).

    Args:
        x: ``[B, T_w, H, K]``, K even.
        positions: ``[T_w]`` int64, the position of each local token **inside its document**
            (``shard.document_positions``), on any device.
        base: wavelengths run from 2 pi to ``2 pi * base`` tokens.

    Returns:
        ``[B, T_w, H, K]`` in x's dtype; angles are computed in float32 (float64 for float64 inputs).
    """
    half = x.shape[-1] // 2
    if 2 * half != x.shape[-1]:
        raise ValueError(f"x: rotary embedding needs an even head width, got K = {x.shape[-1]}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Angles in float64 first: at position 1,000,000 a float32 product is already off by 0.06 radians.
    frequencies = base ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    angles = positions.to(x.device, torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
