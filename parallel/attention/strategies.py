"""Every strategy's forward and backward on one rank's tensors: the ring, the gather, and Ulysses around a ring.

Heads go through all at once, or a group of key heads with their query heads after the other: then float32 results and
gradients live for one group, and are rounded before the next one's are made. All of them go through the same intervals
and the same kernels (`attention_forward`, `attention_backward`), one turn of a ring over one rank included.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.parallel.attention import gather, ring
from longtrain.parallel.attention.call import AttentionCall
from longtrain.parallel.communication import accumulation_dtype
from longtrain.parallel.heads import HeadExchange


def attention_forward_over_ranks(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *, wide: bool, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out ``[B, T_w, H, V]`` in q's dtype, lse ``[B, T_w, H]`` in the state dtype, and what is held for backward.

    wide: out in the state dtype, for a caller that goes on with it. keep: hold what backward need not fetch again: the
    ring's last keys and values; with Ulysses, everything by heads.
    """
    with without_autocast(q.device):
        dtype = accumulation_dtype(q.dtype) if wide else q.dtype
        if call.degree == 1:
            return _forward(q, k, v, call, dtype=dtype, keep=keep)
        exchange = HeadExchange(call.shard, call.key_shard, degree=call.degree, heads=q.shape[2], groups=k.shape[2])
        by_heads = exchange.to_heads([q], [k, v])
        out, lse, last = _forward(by_heads[0], by_heads[1], by_heads[2], call, dtype=dtype, keep=keep)
        held = [*by_heads, out, lse, *last] if keep else []
        out, lse = exchange.to_tokens([out, lse], [], k.shape[2])
        return out, lse, held


def attention_backward_over_ranks(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    held: Sequence[Tensor],
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v. out, lse, held: what forward returned.

    With Ulysses and `held` nothing but their shapes and dtypes is taken from q, k, v, out and lse.
    """
    with without_autocast(q.device):
        state, dtypes, groups = accumulation_dtype(q.dtype), (q.dtype, k.dtype, v.dtype), k.shape[2]
        exchange = None
        if call.degree > 1:
            exchange = HeadExchange(call.shard, call.key_shard, degree=call.degree, heads=q.shape[2], groups=groups)
            # Another rank's loss may use lse where this one's does not: all send the same.
            gradients = [dout, torch.zeros_like(lse) if dlse is None else dlse]
            if held:
                dout, dlse = exchange.to_heads(gradients, [])
                q, k, v, out, lse, *held = held
            else:
                q, out, lse, dout, dlse, k, v = exchange.to_heads([q, out, lse, *gradients], [k, v])
        # With Ulysses dq is complete; the copies of a key head have yet to be summed.
        ready = dtypes if exchange is None else (dtypes[0], state, state)
        grads = _backward(q, k, v, out=out, lse=lse, dout=dout, dlse=dlse, held=held, dtypes=ready, call=call)
        if exchange is not None:
            grads = exchange.to_tokens(grads[:1], grads[1:], groups)
            grads = [gradient.to(dtype) for gradient, dtype in zip(grads, dtypes, strict=True)]
        dq, dk, dv = grads
        return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *, dtype: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out in `dtype`, lse, and if wanted the keys and values held last, a group of heads after the other."""
    groups = list(_head_groups(q, k, call))
    if len(groups) == 1:
        out, lse, last = _pass_forward(q, k, v, call)
        return out.to(dtype), lse, last if keep else []
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=dtype)
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))
    held: list[Tensor] = []
    for heads, key_heads in groups:
        of_group = _pass_forward(q[:, :, heads], k[:, :, key_heads], v[:, :, key_heads], call)
        out[:, :, heads], lse[:, :, heads] = of_group[:2]
        last = of_group[2] if keep else []
        if last and not held:
            held = [x.new_empty((*x.shape[:2], k.shape[2], x.shape[3])) for x in last]
        for whole, part in zip(held, last, strict=True):
            whole[:, :, key_heads] = part
        del of_group, last  # not beside the next group's
    return out, lse, held


def _pass_forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor, list[Tensor]]:
    if call.strategy == "gather":
        return *gather.forward(q, k, v, call), []
    return ring.forward(q, k, v, call)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    held: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
    call: AttentionCall,
) -> list[Tensor]:
    """dq, dk, dv in `dtypes`, a group of heads after the other."""
    groups, state = list(_head_groups(q, k, call)), lse.dtype
    whole: list[Tensor] = []
    if len(groups) > 1:
        whole = [x.new_empty(x.shape, dtype=dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)]
    for heads, key_heads in groups:
        keys, values = (x[:, :, key_heads] for x in (k, v))
        final = {
            "out": out[:, :, heads].to(state),
            "lse": lse[:, :, heads],
            "dout": dout[:, :, heads].to(state),
            "dlse": None if dlse is None else dlse[:, :, heads],
        }
        if call.strategy == "gather":
            grads = gather.backward(q[:, :, heads], keys, values, **final, call=call)
        else:
            last = [x[:, :, key_heads] for x in held]
            grads = ring.backward(q[:, :, heads], keys, values, **final, held=last, call=call)
        if len(groups) == 1:
            return [gradient.to(dtype) for gradient, dtype in zip(grads, dtypes, strict=True)]
        for gradient, part, part_heads in zip(whole, grads, (heads, key_heads, key_heads), strict=True):
            gradient[:, :, part_heads] = part
        del grads, final  # not beside the next group's
    return whole


def _head_groups(q: Tensor, k: Tensor, call: AttentionCall) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key heads, as many at a time as the call says."""
    groups = k.shape[2]
    share, at_once = q.shape[2] // groups, min(call.heads_at_once or groups, groups)
    for start in range(0, groups, at_once):
        stop = min(start + at_once, groups)
        yield slice(start * share, stop * share), slice(start, stop)
