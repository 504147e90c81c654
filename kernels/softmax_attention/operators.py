"""The registered operators `longtrain::softmax_attention` and `..._backward`, on one device.

To selective checkpointing, torch.compile and fake tensors each is a single step. They take tensors, numbers and
strings; boundaries of documents are int64 tensors on the CPU, None for one document.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.softmax_attention import configs
from longtrain.kernels.softmax_attention.device_intervals import plain_mask
from longtrain.kernels.softmax_attention.passes import attention_backward, attention_forward

NAME = "longtrain::softmax_attention"
_OPTIONS = "bool causal, int? left, int? right, float scale, float? softcap, str backend"


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # backend: "triton", "torch", "chunked", "reference" or "auto": "triton", or a vendor's kernel where it is faster.
    # wide: out in the state dtype.
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor? offsets, Tensor? key_offsets, *, {_OPTIONS}, bool wide) "
    "-> (Tensor out, Tensor lse)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    *,
    wide: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    intervals = _intervals(q, k, offsets, key_offsets, **options)
    state = _state_dtype(q, k, v)
    backend, scores = options["backend"], {"scale": options["scale"], "softcap": options["softcap"]}
    with without_autocast(q.device):
        if backend == "auto" and not wide and (name := _vendor(q, k, v, intervals, options["softcap"])):
            from longtrain.kernels.softmax_attention import vendor

            causal = plain_mask(intervals) == "causal"
            return vendor.forward(name, q, k, v, intervals, causal=causal, scale=options["scale"])
        out, lse = _results(q, k, v, wide=wide)
        if backend in ("auto", "triton"):
            from longtrain.kernels.softmax_attention import triton_impl

            triton_impl.forward(q, k, v, intervals, **scores, out=out, lse=lse, accumulate=False)
            return out, lse
        out, lse = out.to(state).zero_(), lse.fill_(-torch.inf)
        attention_forward(q, k, v, intervals, **scores, out=out, lse=lse, backend=backend)
        return out if wide else out.to(q.dtype), lse


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? offsets, "
    f"Tensor? key_offsets, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
)
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    intervals = _intervals(q, k, offsets, key_offsets, **options)
    backend, scores = options["backend"], {"scale": options["scale"], "softcap": options["softcap"]}
    with without_autocast(q.device):
        # A vendor's kernel takes no dlse, and out in half precision has no room for it.
        alone = backend == "auto" and dlse is None and dout.dtype == out.dtype == q.dtype
        if alone and (name := _vendor(q, k, v, intervals, options["softcap"])):
            from longtrain.kernels.softmax_attention import vendor

            given = {"out": out, "lse": lse, "dout": dout, "scale": options["scale"]}
            return vendor.backward(name, q, k, v, intervals, **given, causal=plain_mask(intervals) == "causal")
        if backend in ("auto", "triton"):
            from longtrain.kernels.softmax_attention import triton_impl

            dq, dk, dv = _gradients(q, k, v)
            given = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
            triton_impl.backward(q, k, v, intervals, **scores, **given, accumulate=False)
            return dq, dk, dv
        state = lse.dtype
        dq, dk, dv = (torch.zeros(x.shape, dtype=state, device=x.device) for x in (q, k, v))
        given = {"out": out.to(state), "lse": lse, "dout": dout.to(state), "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
        attention_backward(q, k, v, intervals, **scores, **given, backend=backend)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def documents(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | np.ndarray | None, cu_seqlens_k: Tensor | np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Document boundaries of queries and keys, as many of one as of the other."""
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    query_offsets = checks.document_offsets("cu_seqlens", cu_seqlens, tokens=queries, batch=batch)
    if cu_seqlens is not None and cu_seqlens_k is None:
        if queries != keys:
            raise ValueError(
                f"cu_seqlens_k: got None with {queries} queries and {keys} keys, expected boundaries of the keys"
            )
        return query_offsets, query_offsets
    key_offsets = checks.document_offsets("cu_seqlens_k", cu_seqlens_k, tokens=keys, batch=batch)
    if query_offsets.size != key_offsets.size:
        raise ValueError(
            f"cu_seqlens_k: got {key_offsets.size - 1} documents, expected as many as queries have, "
            f"{query_offsets.size - 1}"
        )
    return query_offsets, key_offsets


def _intervals(
    q: Tensor,
    k: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    *,
    causal: bool,
    left: int | None,
    right: int | None,
    **_: Any,
) -> KeyIntervals:
    query_ends, key_ends = documents(q, k, offsets, key_offsets)
    return _shared_intervals(query_ends.tobytes(), key_ends.tobytes(), causal, left, right)


@lru_cache(maxsize=8)
def _shared_intervals(
    query_ends: bytes, key_ends: bytes, causal: bool, left: int | None, right: int | None
) -> KeyIntervals:
    """Found once for all layers of a model, in both directions."""
    query_offsets, key_offsets = (np.frombuffer(x, dtype=np.int64) for x in (query_ends, key_ends))
    first, stop = visible_keys(
        np.arange(query_offsets[-1], dtype=np.int64),
        causal=causal,
        window=None if left is None and right is None else (left, right),
        query_offsets=query_offsets,
        key_offsets=key_offsets,
    )
    return KeyIntervals(first, stop, int(key_offsets[-1]))


def _vendor(q: Tensor, k: Tensor, v: Tensor, intervals: KeyIntervals, softcap: float | None) -> str | None:
    """Whose kernel is faster than ours for this call, if one is and can run it."""
    width = q.shape[3]
    if softcap is not None or not q.dtype == k.dtype == v.dtype or v.shape[3] != width or q.numel() == 0:
        return None
    if plain_mask(intervals) is None or any(x.stride(-1) != 1 for x in (q, k, v)):
        return None
    return configs.vendor(device=q.device, dtype=q.dtype, width=width)


def _state_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _results(q: Tensor, k: Tensor, v: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """Empty out and lse."""
    state = _state_dtype(q, k, v)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=state if wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=state)


def _gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty dq, dk and dv."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


@_forward.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor | None, key_offsets: Tensor | None, *, wide: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    return _results(q, k, v, wide=wide)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None, **__: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(q, k, v)


def _save(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    *tensors, offsets, key_offsets = inputs
    ctx.save_for_backward(*tensors, *output, offsets, key_offsets)
    ctx.options = {name: x for name, x in keyword_only_inputs.items() if name != "wide"}
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dlse is None:
        return (None,) * 5
    q, k, v, out, lse, offsets, key_offsets = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    found = _backward(dout, dlse, q, k, v, out, lse, offsets, key_offsets, **ctx.options)
    gradients = (x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=False))
    return (*gradients, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
