"""Calls that launch every variant of the convolution's kernels that ships, on tensors without memory."""

from collections.abc import Callable

import numpy as np
import torch

from longtrain.kernels.causal_conv1d import triton_impl

_ONE = np.array([0, 1000])
_PACKED = np.array([0, 300, 1000])


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """By name, each to be run under `launching.recording`; full: every variant, otherwise those that matter most."""
    chosen = {"bf16 silu packed with a halo": lambda: _both(torch.bfloat16, 4, _PACKED, halo=True)}
    if full:
        chosen |= {
            "bf16 silu": lambda: _both(torch.bfloat16, 4, _ONE),
            "bf16 silu packed": lambda: _both(torch.bfloat16, 4, _PACKED),
            "bf16 silu with a halo": lambda: _both(torch.bfloat16, 4, _ONE, halo=True),
            "bf16": lambda: _both(torch.bfloat16, 4, _PACKED, activation=None, bias=False),
            "fp16 silu": lambda: _both(torch.float16, 4, _PACKED, halo=True),
            "fp32 silu": lambda: _both(torch.float32, 4, _PACKED, halo=True),
            "fp32 silu, width 16": lambda: _both(torch.float32, 16, _PACKED, halo=True),
        }
    return chosen


def _both(
    dtype: torch.dtype,
    width: int,
    offsets: np.ndarray,
    *,
    halo: bool = False,
    activation: str | None = "silu",
    bias: bool = True,
) -> None:
    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    x, weight = empty(1, 1000, 512), empty(512, width)
    given = empty(512) if bias else None
    counts = np.full(offsets.size - 1, width - 1) if halo and offsets.size > 2 else None
    options = {
        "halo": empty(1, offsets.size - 1, width - 1, 512) if halo else None,
        "halo_counts": counts,
        "activation": activation,
    }
    triton_impl.forward(x, weight, given, offsets, **options)
    triton_impl.backward(empty(1, 1000, 512), x, weight, given, offsets, **options)
