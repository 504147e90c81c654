"""Rotary position embedding by explicit positions, so that it is right for any shard of any packed sequence."""

from torch import Tensor

from longtrain.kernels import rotary


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
    return rotary(x, positions, base=base)
