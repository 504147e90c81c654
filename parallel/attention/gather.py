"""All-gather attention: every rank gets all keys and values, a few heads at a time, the next ones under this one's
work.

With grouped heads K and V are H/G times smaller than Q, and inside a node one gather of them is cheaper than the steps
of a ring at moderate lengths (Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.2). Memory: the keys
and values of up to three groups of heads for the whole sequence (in use, arriving, and the one before until its
successor is unpacked), in backward also two groups' float32 gradients, whatever the number of heads.

Letters as in `longtrain.parallel.attention`; h the key heads gathered at once, S the most keys of any rank.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtrain.kernels.softmax_attention import attention_backward, attention_forward
from longtrain.parallel.attention.call import AttentionCall
from longtrain.parallel.attention.plan import gather_plan
from longtrain.parallel.communication import Exchange, Handle, accumulation_dtype, all_gather_stacked

_LEAST_BYTES = 1 << 20  # gathered at once, from all ranks: below, the latency of a message counts more than its bytes


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """out ``[B, T_w, H, V]`` and lse ``[B, T_w, H]`` in the state dtype, before sinks."""
    plan, state = call.planned(gather_plan), accumulation_dtype(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=state, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=state, device=q.device)
    for heads, _, blocks in _gathered(q, k, v, call):
        for (key, value), intervals in zip(blocks, plan.intervals, strict=True):
            if not intervals.area:
                continue
            attention_forward(
                q[:, :, heads],
                key,
                value,
                intervals,
                scale=call.scale,
                softcap=call.softcap,
                out=out[:, :, heads],
                lse=lse[:, :, heads],
                backend=call.backend,
            )
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the state dtype: K and V are gathered again, shares of dK and dV go straight to the keys' ranks.

    A share travels while the next heads are computed, and holds only the keys that this rank's queries see. Shares are
    added in the order of the ranks, this rank's own first.
    """
    plan, rank, state = call.planned(gather_plan), call.shard.rank, out.dtype
    dq, dk, dv = (torch.zeros_like(x, dtype=state, memory_format=torch.contiguous_format) for x in (q, k, v))
    under_way: tuple[Exchange, slice, list[list[Tensor]]] | None = None
    for heads, key_heads, blocks in _gathered(q, k, v, call):
        shares: list[list[Tensor]] = []
        for source, ((key, value), intervals) in enumerate(zip(blocks, plan.intervals, strict=True)):
            share = (
                [dk[:, :, key_heads], dv[:, :, key_heads]]
                if source == rank
                else [torch.zeros(x.shape, dtype=state, device=x.device) for x in (key, value)]
                if intervals.area
                else []
            )
            shares.append(share)
            if not intervals.area:
                continue
            attention_backward(
                q[:, :, heads],
                key,
                value,
                intervals,
                out=out[:, :, heads],
                lse=lse[:, :, heads],
                dout=dout[:, :, heads],
                dlse=None if dlse is None else dlse[:, :, heads],
                scale=call.scale,
                softcap=call.softcap,
                dq=dq[:, :, heads],
                dk=share[0],
                dv=share[1],
                backend=call.backend,
            )
        if under_way is not None:
            _add(under_way, dk, dv, call)
        under_way = _send_shares(shares, key_heads, dk, dv, call)
    if under_way is not None:
        _add(under_way, dk, dv, call)
    return dq, dk, dv


def heads_at_once(k: Tensor, v: Tensor, call: AttentionCall) -> int:
    """The key heads of one gather: one, or more where their keys and values are few bytes. The same on every rank."""
    one_head = k.shape[0] * call.key_shard.length * (k.shape[3] + v.shape[3]) * k.element_size()
    return min(k.shape[2], -(-_LEAST_BYTES // max(one_head, 1)))


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
) -> Iterator[tuple[slice, slice, list[tuple[Tensor, Tensor]]]]:
    """Query heads, their key heads, and (k, v) ``[B, S_w, h, ...]`` of every rank; the next gather is under way."""
    share, at_once = q.shape[2] // k.shape[2], heads_at_once(k, v, call)
    starts = range(0, k.shape[2], at_once)
    coming = _start(k, v, slice(0, at_once), call)
    for start in starts:
        heads, gathering = slice(start, min(start + at_once, k.shape[2])), coming
        if heads.stop < k.shape[2]:
            coming = _start(k, v, slice(heads.stop, min(heads.stop + at_once, k.shape[2])), call)
        yield slice(heads.start * share, heads.stop * share), heads, _unpacked(gathering, k, v, heads, call)


def _start(k: Tensor, v: Tensor, heads: slice, call: AttentionCall) -> Handle:
    """Start to gather some heads: one flat message, keys and then values, as long as the longest rank needs it."""
    most, (batch, tokens) = max(call.key_shard.lengths), k.shape[:2]
    parts = [x[:, :, heads] for x in (k, v)]
    message = k.new_empty(sum(batch * most * x.shape[2] * x.shape[3] for x in parts))
    begin = 0
    for x in parts:
        end = begin + batch * tokens * x.shape[2] * x.shape[3]
        message[begin:end].view(x.shape).copy_(x)
        begin = end
    message[begin:] = 0
    return all_gather_stacked(message, call.shard.group)


def _unpacked(
    gathering: Handle, k: Tensor, v: Tensor, heads: slice, call: AttentionCall
) -> list[tuple[Tensor, Tensor]]:
    count, blocks = heads.stop - heads.start, []
    for message, tokens in zip(gathering.wait(), call.key_shard.lengths, strict=True):
        shapes = [(k.shape[0], tokens, count, x.shape[3]) for x in (k, v)]
        sizes = [shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes]
        key, value = message[: sum(sizes)].split(sizes)
        blocks.append((key.view(shapes[0]), value.view(shapes[1])))
    return blocks


def _send_shares(
    shares: Sequence[Sequence[Tensor]], heads: slice, dk: Tensor, dv: Tensor, call: AttentionCall
) -> tuple[Exchange, slice, list[list[Tensor]]]:
    plan, rank = call.planned(gather_plan), call.shard.rank
    sends, receives, arriving = [], [], []
    for other, (seen, shown) in enumerate(zip(plan.seen, plan.shown, strict=True)):
        buffers: list[Tensor] = []
        if other != rank:
            sends += [(other, x[:, seen.start : seen.stop]) for x in shares[other]]
            buffers = [
                torch.empty_like(x[:, : shown.size, heads], memory_format=torch.contiguous_format) for x in (dk, dv)
            ]
            receives += [(other, x) for x in buffers]
        arriving.append(buffers)
    return Exchange(sends, receives, call.shard.group), heads, arriving


def _add(under_way: tuple[Exchange, slice, list[list[Tensor]]], dk: Tensor, dv: Tensor, call: AttentionCall) -> None:
    exchange, heads, arriving = under_way
    exchange.wait()
    for buffers, shown in zip(arriving, call.planned(gather_plan).shown, strict=True):
        for x, total in zip(buffers, (dk, dv), strict=False):
            total[:, shown.start : shown.stop, heads] += x
