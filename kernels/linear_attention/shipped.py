"""Every kernel and configuration of linear attention that a card may be given, for whoever compiles them without one.

A call is the host code on tensors of the device "meta"; run under `launching.recording` it tells what it would launch.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

_TOKENS = 8192  # several parts for one row

# name -> (form of decay, dtype, K, V, G)
_FEW = {"fixed decay": ("head", torch.bfloat16, 128, 128, 8)}
_MORE = {
    "decay per channel": ("channel", torch.bfloat16, 128, 128, 8),
    "no decay": ("none", torch.bfloat16, 128, 128, 8),
    "decay per token": ("token", torch.bfloat16, 128, 128, 8),
    "narrow": ("token", torch.bfloat16, 64, 64, 8),
    "narrow, per channel": ("channel", torch.bfloat16, 64, 64, 8),
    "broad": ("token", torch.bfloat16, 256, 256, 8),
    "broad, per channel": ("channel", torch.bfloat16, 256, 256, 8),
    "unequal, shared heads": ("token", torch.bfloat16, 96, 256, 2),
    "float16": ("token", torch.float16, 128, 128, 8),
    "float32": ("token", torch.float32, 64, 64, 8),
    "float32, per channel": ("channel", torch.float32, 64, 64, 8),
    "float32, broad": ("token", torch.float32, 256, 256, 8),
}


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """Forward and backward of each form by name; with `full` all widths, dtypes and forms, else those that matter."""
    return {name: partial(_both, *case) for name, case in (_FEW | (_MORE if full else {})).items()}


def _both(form: str, dtype: torch.dtype, key_width: int, value_width: int, groups: int) -> None:
    from longtrain.kernels.linear_attention.triton_impl import LinearAttentionBackward, LinearAttentionForward

    def tokens(*size: int) -> torch.Tensor:
        return torch.empty((1, _TOKENS, *size), dtype=dtype, device="meta")

    heads = 8
    q, k, v = tokens(groups, key_width), tokens(groups, key_width), tokens(heads, value_width)
    shapes = {"head": (heads,), "token": (1, _TOKENS, heads), "channel": (1, _TOKENS, heads, key_width)}
    log_decay = None if form == "none" else torch.empty(shapes[form], device="meta")
    offsets = np.array([0, _TOKENS])
    out, _ = LinearAttentionForward(q, k, v, log_decay, offsets, scale=0.1).finish(None)
    backward = LinearAttentionBackward(q, k, v, log_decay, offsets, out, scale=0.1)
    # A fixed decay is hardly ever trained.
    backward.finish(None, None, need_decay_gradient=form in ("token", "channel"), need_state_gradient=False)
