"""The kernels of softmax attention that ship, as calls on tensors without data, for compile tests.

What a user can reach is a product: kernel (forward, dQ, dK/dV, and the small one that prepares backward), dtype, padded
widths, ends as diagonals or vectors, softcap or none, writing, accumulating or repairing, a positive scale or another.
The full list is a cover of it, for each of the three widths that have configurations of their own:

- All of what takes registers at once and each of the two tables: vectors of ends (diagonals are computed instead of
  loaded, the rest is the same code), with and without softcap, accumulating and not, in bfloat16.
- Plain masks, which are called the most, and repairing after a vendor's kernel, which is that kernel behind a check.
- float32, one table for writing and accumulating: the latter, which is the former and a load; softcap or none.
- float16, bfloat16's configuration and code but for the conversions, which are cheaper: accumulating.
- Widths that are padded, unequal widths, strides that are no multiple of 16, and scales that are not positive.

What is left out differs from one of these in what it lacks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.softmax_attention import triton_impl

_TOKENS = 1024


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """Calls by name, each launching a kernel or two in `launching.recording`; without `full` those that matter most."""
    half, other, single = torch.bfloat16, torch.float16, torch.float32
    found: dict[str, Callable[[], None]] = {}

    def _add(*passes: str, widths: tuple[int, int], dtype: torch.dtype, **options: Any) -> None:
        name = f"{str(dtype).removeprefix('torch.')} {_name(*widths, **options)}"
        for one in passes:
            run = {"forward": _forward, "backward": _backward}[one]
            found.setdefault(f"{one} {name}", partial(run, *widths, dtype, **options))

    both = "forward", "backward"
    most = {"packed": True, "accumulate": True}
    _add(*both, widths=(64, 64), dtype=half)
    _add(*both, widths=(128, 128), dtype=half)
    _add(*both, widths=(128, 128), dtype=half, **most)
    _add(*both, widths=(256, 256), dtype=half)
    _add(*both, widths=(128, 128), dtype=single, **most)
    if not full:
        return found
    for widths in ((64, 64), (128, 128), (256, 256)):
        for options in _most_options():
            _add(*both, widths=widths, dtype=half, **options)
        for softcap in (None, 30.0):
            _add(*both, widths=widths, dtype=single, **most, softcap=softcap)
        _add(*both, widths=widths, dtype=other, **most)
        _add("forward", widths=widths, dtype=half, scale=-0.1)
    for widths in ((80, 80), (192, 128), (44, 20)):
        _add(*both, widths=widths, dtype=half, **most)
    return found


def _most_options() -> Iterator[dict[str, Any]]:
    for softcap in (None, 30.0):
        for accumulate in (False, True):
            yield {"packed": True, "accumulate": accumulate, "softcap": softcap}
    yield {}
    yield {"repair": True}


def _name(
    width: int,
    value_width: int,
    *,
    packed: bool = False,
    accumulate: bool = False,
    softcap: float | None = None,
    repair: bool = False,
    scale: float = 0.1,
) -> str:
    parts = {
        "softcap": softcap is not None,
        "documents": packed,
        "accumulating": accumulate,
        "repairing": repair,
        "negative scale": scale < 0,
    }
    widths = str(width) if width == value_width else f"K {width} V {value_width}"
    return ", ".join([widths, *(name for name, holds in parts.items() if holds)])


def _forward(
    width: int,
    value_width: int,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    accumulate: bool = False,
    softcap: float | None = None,
    repair: bool = False,
    scale: float = 0.1,
) -> None:
    q, k, v, out = _tensors(width, value_width, dtype)
    out = out.to(torch.float32) if accumulate else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    options = {"scale": scale, "softcap": softcap, "accumulate": accumulate, "repair": repair}
    triton_impl.forward(q, k, v, _intervals(packed), out=out, lse=lse, **options)


def _backward(
    width: int,
    value_width: int,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    accumulate: bool = False,
    softcap: float | None = None,
    repair: bool = False,
    scale: float = 0.1,
) -> None:
    q, k, v, out = _tensors(width, value_width, dtype)
    state = torch.float32 if accumulate else dtype
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    dq, dk, dv = (torch.empty(x.shape, dtype=state, device="meta") for x in (q, k, v))
    triton_impl.backward(
        q,
        k,
        v,
        _intervals(packed),
        out=out,
        lse=lse,
        dout=out.to(state),
        dlse=lse if accumulate else None,
        scale=scale,
        softcap=softcap,
        dq=dq,
        dk=dk,
        dv=dv,
        accumulate=accumulate,
        repair=repair,
    )


def _tensors(width: int, value_width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v and out, with 8 query heads on 2 key heads."""
    sizes = ((8, width), (2, width), (2, value_width), (8, value_width))
    return [torch.empty((1, _TOKENS, *size), dtype=dtype, device="meta") for size in sizes]


def _intervals(packed: bool) -> KeyIntervals:
    offsets = np.array([0, 500, _TOKENS] if packed else [0, _TOKENS])
    first, stop = visible_keys(np.arange(_TOKENS), causal=True, window=None, query_offsets=offsets, key_offsets=offsets)
    return KeyIntervals(first, stop, _TOKENS)
