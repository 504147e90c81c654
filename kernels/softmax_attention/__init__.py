"""Softmax attention on one device: the public operator, and the two passes on key intervals that rings call too."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.softmax_attention import reference, torch_impl

__all__ = ["apply_sinks", "attention_backward", "attention_forward", "softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | np.ndarray | None = None,
    cu_seqlens_k: Tensor | np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over the keys that each query sees (Vaswani et al. 2017, equation 1).

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with G a divisor of H -> out [B, T, H, V] in q's dtype, and lse
    [B, T, H], the natural logarithm of the sum of exp(score), in float32 (float64 for float64 inputs). Floating-point
    dtypes may differ; halves are computed in float32. Both results are differentiable. A query that sees no key gets
    out 0, lse -inf and exactly zero gradients.

    causal: a query sees the keys up to its own position; with S != T the last query stands on the last key.
    window: (left, right): the query on key c sees c-left ... c+right; None inside is unlimited; causal makes right 0.
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        no query sees another document. Best kept on the CPU: elsewhere the host waits to read it.
    cu_seqlens_k: the same for the keys, from 0 to S; None means `cu_seqlens`.
    scale: multiplies q . k; default K ** -0.5. softcap: c turns scores into c * tanh(score / c) (Gemma 2).
    sinks: [H], logits that join each softmax's denominator only; lse does not include them (gpt-oss).
    return_lse: False returns (out, None).
    backend: "auto", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, windows, backends.
    """
    _check_inputs(q, k, v, sinks)
    backend = choose_backend("softmax_attention", backend, device=q.device)
    window = checks.attention_window(window)
    scale = checks.number("scale", scale)
    scale = float(q.shape[3] ** -0.5) if scale is None else scale
    softcap = checks.number("softcap", softcap, positive=True)
    query_offsets, key_offsets = _documents(q, k, cu_seqlens, cu_seqlens_k)
    if backend == "reference":
        seen = [
            reference.seen_by(i, causal=causal, window=window, query_offsets=query_offsets, key_offsets=key_offsets)
            for i in range(q.shape[1])
        ]
        out, lse = reference.attention(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks)
    else:
        first, stop = visible_keys(
            np.arange(q.shape[1], dtype=np.int64),
            causal=causal,
            window=window,
            query_offsets=query_offsets,
            key_offsets=key_offsets,
        )
        options = _Options(KeyIntervals(first, stop, k.shape[1]), scale=scale, softcap=softcap, backend=backend)
        out, lse = _SoftmaxAttention.apply(q, k, v, options)
        out = out if sinks is None else apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse if return_lse else None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> None:
    """Attend to one set of keys and merge the result, in place, into that of the sets before it.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; `intervals`: for T queries among S keys, the same for every row.
    out [B, T, H, V] and lse [B, T, H]: the running result, float32 (float64 for float64 inputs) whatever q's dtype; at
    the start zeros and -inf. Sets of keys may come in any order; a query that sees none of them is left untouched.
    Not differentiable: `attention_backward` is its gradient.
    """
    backend = choose_backend("softmax_attention", backend, device=q.device)
    forward = {"reference": reference.forward, "torch": torch_impl.forward}[backend]
    with without_autocast(q.device):
        forward(q, k, v, intervals, scale=scale, softcap=softcap, out=out, lse=lse)


def attention_backward(
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
    backend: str,
    frugal: bool = False,
) -> None:
    """Add, in place, the gradients that belong to one set of keys.

    q, k, v, intervals, scale, softcap as in `attention_forward`; out [B, T, H, V] and lse [B, T, H] final, over all
    sets of keys; dout [B, T, H, V] and dlse [B, T, H] (None: zero) their gradients; dq [B, T, H, K], dk [B, S, G, K],
    dv [B, S, G, V] the running gradients. All of these in float32 (float64 for float64 inputs).
    frugal: for a caller that holds other buffers meanwhile, compute in smaller parts, with smaller temporaries.
    """
    backend = choose_backend("softmax_attention", backend, device=q.device)
    backward = {"reference": reference.backward, "torch": torch_impl.backward}[backend]
    options = {"scale": scale, "softcap": softcap} | ({"frugal": frugal} if backend == "torch" else {})
    with without_autocast(q.device):
        backward(q, k, v, intervals, out=out, lse=lse, dout=dout, dlse=dlse, dq=dq, dk=dk, dv=dv, **options)


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let one logit per head join the denominators of finished softmaxes: out * exp(lse) / (exp(lse) + exp(sink)).

    out [B, T, H, V], lse [B, T, H], sinks [H] -> out [B, T, H, V] in out's dtype. Differentiable in all three.
    """
    seeing = lse != -torch.inf  # elsewhere out is 0 already, and a sink of -inf would make NaN
    # Not sigmoid itself: its gradient takes 1 - share, which loses every digit where the sink's part is small.
    share = torch.nn.functional.logsigmoid(torch.where(seeing, lse, 0) - sinks.to(lse.dtype)).exp()
    return out * torch.where(seeing, share, 0)[..., None]


@dataclass(frozen=True)
class _Options:
    intervals: KeyIntervals
    scale: float
    softcap: float | None
    backend: str


class _SoftmaxAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: _Options) -> tuple[Tensor, Tensor]:
        state = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        out = q.new_zeros((*q.shape[:3], v.shape[3]), dtype=state)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=state)
        attention_forward(
            q,
            k,
            v,
            options.intervals,
            scale=options.scale,
            softcap=options.softcap,
            out=out,
            lse=lse,
            backend=options.backend,
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (x.new_zeros(x.shape, dtype=out.dtype) for x in (q, k, v))
        attention_backward(
            q,
            k,
            v,
            ctx.options.intervals,
            out=out,
            lse=lse,
            dout=torch.zeros_like(out) if dout is None else dout,
            dlse=dlse,
            scale=ctx.options.scale,
            softcap=ctx.options.softcap,
            dq=dq,
            dk=dk,
            dv=dv,
            backend=ctx.options.backend,
        )
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    checks.floating("q", q, "[B, T, H, K]")
    checks.floating("k", k, "[B, S, G, K]")
    checks.floating("v", v, "[B, S, G, V]")
    batch, _, heads, width = q.shape
    if heads < 1 or width < 1:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [B, T, H, K] with H and K at least 1")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected [B, S, G, K] with q's B = {batch}, K = {width}")
    checks.grouped_heads(heads, k.shape[2], name="k")
    checks.sizes("v", v, (*k.shape[:3], None), "[B, S, G, V]")
    if sinks is not None:
        checks.sizes("sinks", checks.floating("sinks", sinks, "[H]"), (heads,), "[H]")
    checks.same_device(q=q, k=k, v=v, sinks=sinks)


def _documents(
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
