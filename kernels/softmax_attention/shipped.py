"""The kernels of softmax attention that ship, as calls on tensors without data, for compile tests."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.softmax_attention import triton_impl

_TOKENS = 1024


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """Calls by name, each launching a kernel or two in `launching.recording`; without `full` those that matter most."""
    half, other, single = torch.bfloat16, torch.float16, torch.float32
    found: dict[str, Callable[[], None]] = {
        "forward bfloat16 64": partial(_forward, 64, 64, half),
        "forward bfloat16 128": partial(_forward, 128, 128, half),
        "forward bfloat16 128 documents, accumulating": partial(_forward, 128, 128, half, packed=True, accumulate=True),
        "forward bfloat16 256": partial(_forward, 256, 256, half),
        "forward float32 128": partial(_forward, 128, 128, single),
        "backward bfloat16 128 documents, accumulating": partial(
            _backward, 128, 128, half, packed=True, accumulate=True
        ),
        "backward bfloat16 256": partial(_backward, 256, 256, half),
    }
    if not full:
        return found
    for width in (64, 128, 256):
        for dtype in (half, other, single):
            name = f"{str(dtype).removeprefix('torch.')} {width}"
            found[f"forward {name}"] = partial(_forward, width, width, dtype)
            found[f"backward {name}"] = partial(_backward, width, width, dtype)
        for packed, accumulate in ((True, False), (True, True), (False, True)):
            options = {"packed": packed, "accumulate": accumulate}
            name = f"bfloat16 {width}{', documents' * packed}{', accumulating' * accumulate}"
            found[f"forward {name}"] = partial(_forward, width, width, half, **options)
            found[f"backward {name}"] = partial(_backward, width, width, half, **options)
        found[f"forward bfloat16 {width}, softcap"] = partial(_forward, width, width, half, softcap=30.0)
        found[f"backward bfloat16 {width}, softcap"] = partial(_backward, width, width, half, softcap=30.0)
        found[f"forward bfloat16 {width}, softcap, documents"] = partial(
            _forward, width, width, half, softcap=30.0, packed=True
        )
        found[f"backward bfloat16 {width}, softcap, documents"] = partial(
            _backward, width, width, half, softcap=30.0, packed=True
        )
        found[f"forward bfloat16 {width}, repairing"] = partial(_forward, width, width, half, repair=True)
        found[f"backward bfloat16 {width}, repairing"] = partial(_backward, width, width, half, repair=True)
        for softcap in (None, 30.0):
            name = f"float32 {width}{', softcap' if softcap else ''}, documents"
            found[f"forward {name}"] = partial(_forward, width, width, single, packed=True, softcap=softcap)
            found[f"backward {name}"] = partial(_backward, width, width, single, packed=True, softcap=softcap)
    found["forward bfloat16 K 192 V 128"] = partial(_forward, 192, 128, half)
    found["backward bfloat16 K 192 V 128"] = partial(_backward, 192, 128, half)
    found["forward bfloat16 K 80 V 80"] = partial(_forward, 80, 80, half)
    found["backward bfloat16 K 80 V 80"] = partial(_backward, 80, 80, half)
    return found


def _forward(
    width: int,
    value_width: int,
    dtype: torch.dtype,
    *,
    packed: bool = False,
    accumulate: bool = False,
    softcap: float | None = None,
    repair: bool = False,
) -> None:
    q, k, v, out = _tensors(width, value_width, dtype)
    out = out.to(torch.float32) if accumulate else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="meta")
    options = {"scale": 0.1, "softcap": softcap, "accumulate": accumulate, "repair": repair}
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
        scale=0.1,
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
