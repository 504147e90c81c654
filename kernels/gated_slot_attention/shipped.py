"""Calls that launch every kernel and configuration of gated slot attention that a card may be given.

Its second pass and all of its backward pass are linear attention with decays per channel, which lists those kernels,
for the same buckets of widths and the same kinds of products; so does this list for the kernels of the first pass.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

_TOKENS = 8192  # several parts for one row

# name -> (dtype, K, M)
_FEW = {"64 slots": (torch.bfloat16, 128, 64)}
_MORE = {
    "narrow": (torch.bfloat16, 64, 64),
    "broad": (torch.bfloat16, 256, 256),
    "odd": (torch.bfloat16, 96, 40),
    "float16": (torch.float16, 128, 64),
    "float16, broad": (torch.float16, 256, 256),
    "float32": (torch.float32, 64, 64),
    "float32, middle": (torch.float32, 128, 128),
    "float32, broad": (torch.float32, 256, 256),
}


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """The pass that gives the scores, by name; with `full` all widths and dtypes, else those that matter most."""
    return {name: partial(_scores, *case) for name, case in (_FEW | (_MORE if full else {})).items()}


def _scores(dtype: torch.dtype, key_width: int, slots: int) -> None:
    from longtrain.kernels.gated_slot_attention.triton_impl import SlotScores

    def tokens(width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty((1, _TOKENS, 8, width), dtype=dtype, device="meta")

    given = tokens(key_width), tokens(key_width), tokens(slots), tokens(slots, torch.float32)
    SlotScores(*given, np.array([0, _TOKENS]), scale=0.1).finish(None, return_state=True)
