"""Rotary position embedding: the public operator."""

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.rotary import operators, reference

__all__ = ["rotary"]


def rotary(x: Tensor, positions: Tensor, *, base: float = 10_000.0, backend: str = "auto") -> Tensor:
    """Rotate each pair of channels (i, i + K/2) by the angle ``positions * base^(-2i/K)``.

    ("RoFormer: Enhanced Transformer with Rotary Position Embedding", Su et al. 2021, equation 34, in the order of
    channels that open Llama weights use.)

    x [B, T, H, K], K even, positions int64 [T] on any device -> [B, T, H, K] in x's dtype. Angles are computed in
    float64, products in float32 (float64 for a float64 x). Backward rotates the other way and keeps the positions only.

    base: wavelengths run from 2 pi to ``2 pi * base`` tokens, above 0.
    backend: "auto", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    Raises ValueError naming the argument for anything else: shapes, dtypes, backends.
    """
    checks.floating("x", x, "[B, T, H, K]")
    if x.shape[3] % 2:
        raise ValueError(f"x: rotary embedding needs an even head width, got K = {x.shape[3]}")
    if positions.dtype != torch.int64 or positions.shape != x.shape[1:2]:
        raise ValueError(
            f"positions: got {positions.dtype} of shape {tuple(positions.shape)}, expected int64 of shape "
            f"({x.shape[1]},), one for each token"
        )
    wavelength = checks.number("base", base, positive=True)
    if wavelength is None:
        raise ValueError(f"base: got {base!r}, expected a number above 0")
    places = positions.to(x.device)
    if choose_backend("rotary", backend, device=x.device) == "reference":
        with without_autocast(x.device):
            return reference.rotary(x, places, base=wavelength)
    return operators.forward(x, places, base=wavelength, inverse=False)
