"""Rotary embedding tile by tile of tokens, so that angles in float64 and products in float32 stay small."""

import torch
from torch import Tensor

from longtrain.kernels import launching

# Numbers of a tile: on a CPU half a megabyte in float32; an accelerator wants few large calls instead.
_CPU_TILE, _DEVICE_TILE = 2**17, 2**26


def rotate(x: Tensor, positions: Tensor, *, base: float, inverse: bool) -> Tensor:
    """x [B, T, H, K] rotated, or rotated back with `inverse`, contiguous, in its dtype."""
    dtype, half = torch.promote_types(x.dtype, torch.float32), x.shape[3] // 2
    # Angles in float64 first: at position 1,000,000 a float32 product is already off by 0.06 radians.
    frequencies = base ** (torch.arange(half, device=x.device, dtype=torch.float64) / -half)
    out = x.new_empty(x.shape)
    numbers = max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    size = max(1, (_CPU_TILE if x.device.type == "cpu" else _DEVICE_TILE) // numbers)
    for tile in launching.tiles(x.shape[1], size, x.device):
        angles = positions[tile].to(torch.float64)[:, None] * frequencies
        cos, sin = angles.cos().to(dtype)[:, None], angles.sin().to(dtype)[:, None]
        first, second = x[:, tile, :, :half], x[:, tile, :, half:]
        if inverse:
            out[:, tile, :, :half] = first * cos + second * sin
            out[:, tile, :, half:] = second * cos - first * sin
        else:
            out[:, tile, :, :half] = first * cos - second * sin
            out[:, tile, :, half:] = second * cos + first * sin
    return out
