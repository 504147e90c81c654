"""Calls that launch every variant of the gated delta rule's kernels that ships, on tensors without memory.

How this covers what a user can reach: blocks depend on three buckets of widths (the wider one counts) and on whether
products take half precision or float32, and code besides on the form of decay: in bfloat16 all of these are here.
Float16 takes the same blocks and as much room; float32 without decays is float32 with one per head and less to load.
Widths that are no power of two add masks, shared heads change a number.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule import triton_impl

_OFFSETS = np.array([0, 4096])


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """By name, each to be run under `launching.recording`; full: every variant, otherwise those that matter most."""
    bf16 = torch.bfloat16
    chosen: dict[str, Callable[[], None]] = {
        "bf16 per head 128": lambda: _both(bf16, 128, 128, gate=1),
        "bf16 per channel 128, last kernel": lambda: _last_kernel(bf16, 128, 128),
    }
    if full:
        for width in (64, 128, 256):
            for gate, name in enumerate(("no decay", "per head", "per channel")):
                chosen[f"bf16 {name} {width}"] = lambda width=width, gate=gate: _both(
                    bf16, width, width, gate=gate, staged=True
                )
        chosen |= {
            "bf16 per head 128 256": lambda: _both(bf16, 128, 256, gate=1, staged=True),
            "bf16 per head 96 192, shared heads": lambda: _both(bf16, 96, 192, gate=1, groups=2),
            "fp16 per head 128": lambda: _both(torch.float16, 128, 128, gate=1),
            "fp32 per head 64": lambda: _both(torch.float32, 64, 64, gate=1, staged=True),
            "fp32 per head 128": lambda: _both(torch.float32, 128, 128, gate=1),
            "fp32 per head 256": lambda: _both(torch.float32, 256, 256, gate=1),
            "fp32 per channel 64": lambda: _both(torch.float32, 64, 64, gate=2),
            "fp32 per channel 128": lambda: _both(torch.float32, 128, 128, gate=2),
            "fp32 per channel 256": lambda: _both(torch.float32, 256, 256, gate=2),
        }
    return chosen


def _inputs(
    dtype: torch.dtype, key_width: int, value_width: int, gate: int, groups: int = 16
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """(q, k, v, beta, log_decay) and dout, with 16 heads."""

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(1, 4096, *size, dtype=dtype, device="meta")

    log_decay = (None, empty(16, dtype=torch.float32), empty(16, key_width, dtype=torch.float32))[gate]
    q, k, v = empty(groups, key_width), empty(groups, key_width), empty(16, value_width)
    return (q, k, v, empty(16), log_decay), torch.empty_like(v)


def _both(
    dtype: torch.dtype, key_width: int, value_width: int, *, gate: int, groups: int = 16, staged: bool = False
) -> None:
    """Forward and backward; staged: by way of summaries, and with states on either side."""
    inputs, dout = _inputs(dtype, key_width, value_width, gate, groups)
    state = torch.empty(1, 1, 16, key_width, value_width, device="meta") if staged else None
    forward = triton_impl.DeltaRuleForward(*inputs, _OFFSETS, scale=0.1)
    backward = triton_impl.DeltaRuleBackward(*inputs, _OFFSETS, dout, scale=0.1)
    if staged:
        forward.summaries()
        backward.summaries()
    forward.finish(state, return_state=staged)
    backward.finish(state, state, need_decay_gradient=gate > 0, need_state_gradient=staged)


def _last_kernel(dtype: torch.dtype, key_width: int, value_width: int) -> None:
    """Of a backward pass with decays per channel only the kernel that takes most registers."""
    inputs, dout = _inputs(dtype, key_width, value_width, gate=2)
    triton_impl.DeltaRuleBackward(*inputs, _OFFSETS, dout, scale=0.1).launch_last_kernel()
