"""Softmax attention in Triton kernels: the host's side, which allocates and launches and never waits for the card.

Forward is one kernel; backward three: delta and lse for all queries, dQ by queries, dK and dV by keys. The mathematics
stands in `triton_forward` and `triton_backward`, the configurations in `configs`.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.launching import Config
from longtrain.kernels.softmax_attention import configs, triton_backward, triton_forward
from longtrain.kernels.softmax_attention.device_intervals import Ends, ends

_LOG2E = math.log2(math.e)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    accumulate: bool = True,
    repair: bool = False,
) -> None:
    """`attention_forward` (see the package) in one kernel.

    accumulate: merge into what out and lse (float32) hold. Otherwise they are only written, out in its own dtype.
    repair: they hold another kernel's result, of which only blocks with NaN or inf are computed, with these contained.
    """
    if out.numel() == 0 or (accumulate and intervals.area == 0):
        return
    q, k, v = _common(q, k, v)
    seen, _ = ends(intervals, q.device)
    wider = max(q.shape[3], v.shape[3])
    variant = {"accumulate": accumulate, "softcap": softcap is not None}
    config = configs.config("forward", device=q.device, dtype=q.dtype, width=wider, **variant)
    config, blocks = _described(config, "BLOCK_N", k, v)
    batch, queries, heads, _ = q.shape
    scores, cap = _exponents(scale, softcap)
    launching.launch(
        triton_forward.forward_kernel,
        (heads * -(-queries // config.constants["BLOCK_M"]), batch),
        q,
        k,
        v,
        out,
        lse,
        *blocks,
        *_ends(seen),
        queries,
        k.shape[1],
        heads,
        heads // k.shape[2],
        scores,
        cap,
        *_strides(q, k, v, out, lse),
        config=config,
        **_widths(q, v),
        VECTORS=seen.first is not None,
        SOFTCAP=softcap is not None,
        POSITIVE=scale > 0,
        ACCUMULATE=accumulate,
        REPAIR=repair,
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    softcap: float | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    accumulate: bool = True,
    repair: bool = False,
) -> None:
    """`attention_backward` (see the package): adds to dq, dk, dv (float32).

    accumulate False: they are only written, each in its own dtype. repair as in `forward`.
    """
    if accumulate and (intervals.area == 0 or dq.numel() == 0):
        return
    q, k, v = _common(q, k, v)
    seen, seeing = ends(intervals, q.device)
    batch, queries, heads, width = q.shape
    keys, groups = k.shape[1:3]
    wider = max(width, v.shape[3])
    dout, delta, exponent = _prepared(out, lse, dout, dlse, dtype=q.dtype)
    scores, cap = _exponents(scale, softcap)
    shared = {"SOFTCAP": softcap is not None, "ACCUMULATE": accumulate, "REPAIR": repair, **_widths(q, v)}
    sizes = queries, keys
    variant = {"accumulate": accumulate, "softcap": softcap is not None}
    config = configs.config("dkdv", device=q.device, dtype=q.dtype, width=wider, **variant)
    config, blocks = _described(config, "BLOCK_M", q, dout)
    launching.launch(
        triton_backward.dkdv_kernel,
        (groups * -(-keys // config.constants["BLOCK_N"]), batch),
        q,
        k,
        v,
        dout,
        exponent,
        delta,
        dk,
        dv,
        *blocks,
        *_ends(seeing),
        *sizes,
        groups,
        heads // groups,
        scores,
        cap,
        scale,
        *_strides(q, k, v, dout, dk, dv),
        config=config,
        VECTORS=seeing.first is not None,
        **shared,
    )
    config = configs.config("dq", device=q.device, dtype=q.dtype, width=wider, **variant)
    config, blocks = _described(config, "BLOCK_N", k, v)
    launching.launch(
        triton_backward.dq_kernel,
        (heads * -(-queries // config.constants["BLOCK_M"]), batch),
        q,
        k,
        v,
        dout,
        exponent,
        delta,
        dq,
        *blocks,
        *_ends(seen),
        *sizes,
        heads,
        heads // groups,
        scores,
        cap,
        scale,
        *_strides(q, k, v, dout, dq),
        config=config,
        VECTORS=seen.first is not None,
        **shared,
    )


def _prepared(
    out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dout in the dtype of k and v, delta and lse * log2(e), both [B, H, T]."""
    batch, queries, heads, width = out.shape
    out, dout = _dense(out), _dense(dout)
    delta = torch.empty((batch, heads, queries), dtype=torch.float32, device=out.device)
    exponent = torch.empty_like(delta)
    cast = None if dout.dtype == dtype else torch.empty(dout.shape, dtype=dtype, device=dout.device)
    config = configs.config("prepare", device=out.device, dtype=dtype, width=width)
    launching.launch(
        triton_backward.prepare_kernel,
        (heads * -(-queries // config.constants["BLOCK_M"]), batch),
        out,
        dout,
        lse,
        dlse,
        cast,
        delta,
        exponent,
        queries,
        heads,
        *_strides(out, dout, lse),
        *((0, 0, 0) if dlse is None else _strides(dlse)),
        config=config,
        V=width,
        PADDED_V=_padded(width),
        CAST=cast is not None,
        DLSE=dlse is not None,
    )
    return dout if cast is None else cast, delta, exponent


def _described(config: Config, size: str, *tensors: Tensor) -> tuple[Config, list[Any]]:
    """Descriptors of [B, T, H, width] tensors for the tensor memory accelerator, as `load_block` wants them, or None.

    Each takes blocks of config.constants[size] tokens. Where the configuration wants them but a tensor lies at an
    address or has strides that are no multiple of 16 bytes, which the accelerator needs, the kernel loads by pointers.
    """
    wanted = config.constants["DESCRIPTORS"] and all(_describable(x) for x in tensors)
    config = replace(config, constants={**config.constants, "DESCRIPTORS": wanted})
    if not wanted:
        return config, [None] * len(tensors)
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows, made = config.constants[size], []
    for x in tensors:
        batch, tokens, heads, width = x.shape
        # Of a dimension of size 1 torch leaves the stride open; any that is allowed will do.
        strides = [x.stride(dim) if x.shape[dim] > 1 else 16 for dim in (0, 2, 1)]
        blocks = [1, 1, rows, _padded(width)]
        made.append(TensorDescriptor(x, [batch, heads, tokens, width], [*strides, 1], blocks))
    return config, made


def _describable(x: Tensor) -> bool:
    address = 0 if launching.runs_nothing(x.device) else x.data_ptr()  # shapes only: what allocators give is aligned
    strides = [x.stride(dim) * x.element_size() for dim in range(3) if x.shape[dim] > 1]
    return x.numel() > 0 and address % 16 == 0 and all(step > 0 and step % 16 == 0 for step in strides)


def _common(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the widest of their dtypes, vectors dense in memory."""
    widest = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = (_dense(x.to(widest)) for x in (q, k, v))
    return q, k, v


def _dense(x: Tensor) -> Tensor:
    """Vectors dense in memory, and the tokens of one block within the reach of 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 1 << 22 else x.contiguous()


def _padded(width: int) -> int:
    """A power of two, and as many as a matrix instruction takes."""
    return max(16, 1 << (width - 1).bit_length())


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    width, value_width = q.shape[3], v.shape[3]
    return {"K": width, "V": value_width, "PADDED_K": _padded(width), "PADDED_V": _padded(value_width)}


def _exponents(scale: float, softcap: float | None) -> tuple[float, float]:
    """What turns q . k into a score times log2(e): one factor, or those before and after tanh."""
    return (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)


def _ends(ends: Ends) -> tuple[Tensor | None, Tensor | None, int, int]:
    return ends.first, ends.stop, ends.first_shift, ends.stop_shift


def _strides(*tensors: Tensor) -> list[int]:
    """Of batch rows, tokens and heads."""
    return [stride for x in tensors for stride in x.stride()[:3]]
