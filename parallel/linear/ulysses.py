"""Tokens for heads: every rank runs the operator of one device on all tokens for its share of the heads.

(Jacobs et al. 2023, "DeepSpeed Ulysses".) No state travels, so nothing waits for another rank's run; but every token
does, so the bytes grow with T. W must divide H; where there are fewer than W heads of q and k, ranks get copies.
"""

from dataclasses import replace

import torch
from torch import Tensor

from longtrain.parallel.communication import accumulation_dtype, all_gather_stacked, reduce_scatter_parts
from longtrain.parallel.heads import HeadExchange
from longtrain.parallel.linear import engine
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.mixers import Tensors
from longtrain.parallel.scan import scan_plan
from longtrain.parallel.shard import SequenceShard

_SHARED = 2  # of the tensors the first two, q and k, have G heads


def forward(tensors: Tensors, initial: Tensor | None, call: ScanCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """As `engine.scan_forward`; saved and carried are those of this rank's heads and all tokens."""
    exchange = _exchange(tensors, call)
    by_heads = _to_heads(exchange, tensors)
    inner = _inner(by_heads, call)
    own = None if initial is None else initial[:, exchange.own_heads]
    out, state, saved, carried = engine.scan_forward(by_heads, own, inner)
    (out,) = exchange.to_tokens([out], [], tensors[0].shape[2])
    if state is not None:  # [W, B, H / W, rows, columns]
        state = all_gather_stacked(state, call.shard.group).wait().transpose(0, 1).contiguous().flatten(1, 2)
    return out, state, saved, carried


def backward(
    tensors: Tensors,
    saved: Tensor,
    carried: Tensor,
    dout: Tensor,
    dstate: Tensor | None,
    call: ScanCall,
    *,
    need_decay: bool,
) -> tuple[Tensors, Tensor | None]:
    """As `engine.scan_backward`; the tensors travel again, with the gradients of the outputs."""
    exchange, world, groups = _exchange(tensors, call), call.shard.world, tensors[0].shape[2]
    *by_heads, dout = _to_heads(exchange, (*tensors, dout))
    if call.return_state:
        if dstate is None:  # the other ranks wait for this one's part all the same
            dstate = carried.new_zeros(call.sizes.state)
        shares = [call.sizes.heads // world] * world
        dstate = reduce_scatter_parts(dstate.transpose(0, 1), shares, call.shard.group).transpose(0, 1)
    inner = _inner(by_heads, call)
    found, dinitial = engine.scan_backward(by_heads, saved, carried, dout, dstate, inner, need_decay=need_decay)
    shared = [x.to(accumulation_dtype(x.dtype)) for x in found[:_SHARED]]  # copies of a head are summed before rounding
    positions = [n for n, x in enumerate(found) if n >= _SHARED and x is not None and x.ndim > 1]
    of_tokens = exchange.to_tokens([found[n] for n in positions], shared, groups)
    gradients: list[Tensor | None] = [x.to(like.dtype) for x, like in zip(of_tokens[-_SHARED:], tensors, strict=False)]
    gradients += [None] * (len(tensors) - _SHARED)
    for position, x in zip(positions, of_tokens, strict=False):
        gradients[position] = x
    if found[-1] is not None and found[-1].ndim == 1:  # decays [H]
        gradients[-1] = torch.zeros_like(tensors[-1])
        gradients[-1][exchange.own_heads] = found[-1]
    if dinitial is None:
        return gradients, None
    whole = dinitial.new_zeros(call.sizes.state)
    whole[:, exchange.own_heads] = dinitial
    return gradients, whole


def carried_sizes(tensors: Tensors, call: ScanCall) -> tuple[int, int]:
    """The numbers in what forward saves and carries over to backward."""
    exchange = _exchange(tensors, call)
    total, (heads, groups) = exchange.tokens[0], exchange.shares
    by_heads = [
        x
        if x is None
        else x.new_empty(heads)
        if x.ndim == 1
        else x.new_empty((x.shape[0], total, groups if n < _SHARED else heads, *x.shape[3:]))
        for n, x in enumerate(tensors)
    ]
    return engine.carried_sizes(by_heads, _inner(by_heads, call))


def _exchange(tensors: Tensors, call: ScanCall) -> HeadExchange:
    heads, groups = call.sizes.heads, tensors[0].shape[2]
    return HeadExchange(call.shard, call.shard, degree=call.shard.world, heads=heads, groups=groups)


def _inner(by_heads: Tensors, call: ScanCall) -> ScanCall:
    """The call that this rank makes by itself."""
    kept = call.shard.plans.setdefault(call.shard, {})
    if ("whole",) not in kept:
        kept["whole",] = SequenceShard.pretend(call.shard.length, rank=0, world=1, cu_seqlens=call.shard.cu_seqlens)
    whole = kept["whole",]
    return replace(call, shard=whole, plan=scan_plan(whole), sizes=call.mixer.sizes(by_heads), strategy="allgather")


def _to_heads(exchange: HeadExchange, tensors: Tensors) -> Tensors:
    """This rank's tokens of all heads -> all tokens of its heads, in one exchange; decays [H] only lose heads."""
    moved = [n for n, x in enumerate(tensors) if n >= _SHARED and x is not None and x.ndim > 1]
    arrived = exchange.to_heads([tensors[n] for n in moved], tensors[:_SHARED])
    found = [*arrived[-_SHARED:], *tensors[_SHARED:]]
    for n, x in zip(moved, arrived, strict=False):
        found[n] = x
    return [x[exchange.own_heads] if x is not None and x.ndim == 1 else x for x in found]
