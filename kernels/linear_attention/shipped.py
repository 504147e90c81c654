"""Every kernel and configuration of linear attention that a card may be given, for whoever compiles them without one.

A call is the host code on tensors of the device "meta"; run under `launching.recording` it tells what it would launch.

How this covers what a user can reach: blocks depend on three buckets of widths (the wider one counts), and code besides
on the form of decay and on what dots take, bfloat16, TF32 (float16) or float32 (and mixtures): all of these are here,
but for decays that are none or fixed. Those are decays per token with less to load and to keep, and trained ones with
the same products; they are here once each. Widths that are no power of two add masks ("unequal" has them). A state that
is given, asked for or absent adds or drops one load or store outside of all loops, and shared heads change a number.
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
    **{
        f"{kind}{bucket}{form and ', per channel'}": (form or "token", dtype, width, width, 8)
        for kind, dtype in (("float16", torch.float16), ("float32", torch.float32))
        for bucket, width in ((", narrow", 64), ("", 128), (", broad", 256))
        for form in ("", "channel")
    },
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
