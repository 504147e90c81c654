"""Every strategy's forward and backward on one rank's tensors: the ring, the gather, and Ulysses around a ring.

All of them go through the same intervals and the same kernels (`attention_forward`, `attention_backward`), one turn of
a ring over one rank included.
"""

from collections.abc import Sequence

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
        if call.strategy == "gather":
            out, lse = gather.forward(q, k, v, call)
            return out.to(dtype), lse, []
        if call.degree == 1:
            out, lse, last = ring.forward(q, k, v, call)
            return out.to(dtype), lse, last if keep else []
        exchange = HeadExchange(call.shard, call.key_shard, degree=call.degree, heads=q.shape[2], groups=k.shape[2])
        by_heads = exchange.to_heads([q], [k, v])
        out, lse, last = ring.forward(by_heads[0], by_heads[1], by_heads[2], call)
        out = out.to(dtype)
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
        final = {"out": out.to(state), "lse": lse, "dout": dout.to(state), "dlse": dlse}
        if call.strategy == "gather":
            grads = gather.backward(q, k, v, **final, call=call)
        else:
            grads = ring.backward(q, k, v, **final, held=held, call=call)
        if exchange is not None:
            # dq is complete; the copies of a key head have yet to be summed.
            grads = exchange.to_tokens([grads[0].to(dtypes[0])], grads[1:], groups)
        dq, dk, dv = (gradient.to(dtype) for gradient, dtype in zip(grads, dtypes, strict=True))
        return dq, dk, dv
