"""Ring attention, single or double: keys and values come to the queries, a step ahead of their use.

Every rank keeps its queries. Keys and values travel point to point, and after all steps each query has met every key
that it may see (Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; Brandon et al.
2023, "Striped Attention: Faster Ring Attention for Causal Transformers", for layouts that balance it). Partial results
are merged in place, so memory does not grow with the number of ranks.

Letters as in `longtrain.parallel.attention`; S a block's keys.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from longtrain.kernels import launching
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.softmax_attention import attention_backward, attention_forward
from longtrain.parallel.attention.call import AttentionCall
from longtrain.parallel.attention.needs import NOTHING, Part
from longtrain.parallel.attention.plan import RingPlan, Round, Stage, ring_plan
from longtrain.parallel.communication import Exchange, accumulation_dtype

Tensors = Sequence[Tensor]
Step = TypeVar("Step", Round, Stage)


class Links:
    """The rows and places between which one rank's ring sends; a team of `degree` neighbours has rings side by side."""

    def __init__(self, call: AttentionCall) -> None:
        grid = call.shard.grid
        self._outer, self._inner, self._degree = grid.outer, grid.inner, call.degree
        self._member = call.shard.rank % call.degree

    def across(self, sends: tuple[int, Tensors], receives: tuple[int, Tensors]) -> Exchange:
        """Tensors to and from a row: (row, tensors)."""
        return Exchange(_each(*sends), _each(*receives), self._outer, kind="outer exchange")

    def along(self, *pairs: tuple[tuple[int, Tensors], tuple[int, Tensors]]) -> Exchange:
        """Tensors to and from places of this row: for each pair (place, tensors) that are sent and received."""
        sends = [message for (place, tensors), _ in pairs for message in _each(self._rank(place), tensors)]
        receives = [message for _, (place, tensors) in pairs for message in _each(self._rank(place), tensors)]
        return Exchange(sends, receives, self._inner)

    def _rank(self, place: int) -> int:
        return place * self._degree + self._member


def plan_of(call: AttentionCall) -> RingPlan:
    return call.planned(ring_plan)


def _to_visit(plan: RingPlan, device: torch.device) -> RingPlan:
    """The steps that a loop on this device has to go through: all, or on a pretended card those that hold something new
    (`launching.visited`): steps over equally many keys hold the same.

    In backward, keys for the next step and gradients of the step before travel beside the third one, and all after it.
    """
    if not launching.runs_nothing(device):
        return plan
    stages = tuple(replace(stage, rounds=_new(stage.rounds, device)) for stage in _new(plan.stages, device))
    return replace(plan, stages=stages)


def _new(steps: tuple[Step, ...], device: torch.device) -> tuple[Step, ...]:
    alike = len({step.size for step in steps[1:]}) == 1
    return tuple(launching.visited(steps, device, first=3)) if alike else steps


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out ``[B, T_w, H, V]`` and lse ``[B, T_w, H]`` in the state dtype, before sinks; and the keys and values held
    last.

    While this rank works on one block, the next one is on its way. In a double ring, the next row's keys are on their
    way during all the rounds of this row's.
    """
    plan, links = _to_visit(plan_of(call), q.device), Links(call)
    state = accumulation_dtype(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=state, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=state, device=q.device)
    own: Tensors = [k.contiguous(), v.contiguous()]
    base, block = own, own
    for stage, coming in zip(plan.stages, (*plan.stages[1:], None), strict=True):
        next_base, outer = [], None
        if coming:
            next_base = _empty(own, coming.size)
            outer = links.across((coming.receiver, _cut(own, coming.sent)), (coming.sender, next_base))
        block = base
        for round_, following in zip(stage.rounds, (*stage.rounds[1:], None), strict=True):
            arriving = _empty(own, following.size) if following else []
            inner = links.along(_keys_on(base, arriving, following)) if following else None
            _attend(q, block, round_.intervals, call, out=out, lse=lse)
            if inner is not None:
                inner.wait()
                block = arriving
        if outer is not None:
            outer.wait()
            base = next_base
    return out, lse, list(block) if plan.travels else []


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    held: Tensors,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ring once more: dq, dk, dv of this rank's q, k, v in the state dtype, for the gradients of out and lse.

    dq stays. A rank's share of a block's dK and dV goes straight back, in the state dtype, to the rank that sent the
    block, during the step after; there the shares are added in the order of the steps, the same in every run. In a
    double ring a row's sum goes back to the row that the block came from. held: what `forward` held last, if it was
    kept: it need not travel again. The rounds of a stage run backwards, so that a single ring uses it at once.
    """
    plan, links = _to_visit(plan_of(call), q.device), Links(call)
    dq = torch.zeros(q.shape, dtype=out.dtype, device=q.device)
    own: Tensors = [k.contiguous(), v.contiguous()]
    home = [torch.zeros_like(x, dtype=out.dtype) for x in own]
    gradients = _Gradients(q, call, out=out, lse=lse, dout=dout, dlse=dlse, dq=dq)
    base = own
    returning: tuple[Exchange, Tensors, Part] | None = None
    for stage, coming in zip(plan.stages, (*plan.stages[1:], None), strict=True):
        next_base, outer = [], None
        if coming and held and coming is plan.stages[-1] and len(coming.rounds) == 1:
            next_base = held
        elif coming:
            next_base = _empty(own, coming.size)
            outer = links.across((coming.receiver, _cut(own, coming.sent)), (coming.sender, next_base))
        sums = home if stage is plan.stages[0] else [torch.zeros_like(x, dtype=out.dtype) for x in base]
        _row_backward(stage.rounds, base, sums, gradients, links, held=held if coming is None else [])
        if outer is not None:
            outer.wait()
        if returning is not None:
            _deliver(returning, home)
        if stage is not plan.stages[0]:
            arriving = _empty(home, stage.sent.size)
            exchange = links.across((stage.sender, sums), (stage.receiver, arriving))
            returning = exchange, arriving, stage.sent
        base = next_base
    if returning is not None:
        _deliver(returning, home)
    dk, dv = home
    return dq, dk, dv


def _row_backward(
    rounds: Sequence[Round], base: Tensors, sums: Tensors, gradients: "_Gradients", links: Links, *, held: Tensors
) -> None:
    """A stage's rounds: adds to dq, and all of this row's shares of this rank's base to `sums`."""
    order = [rounds[0], *reversed(rounds[1:])]
    block: Tensors = base
    before: Round | None = None  # the round whose share goes back now
    share: Tensors = []
    for round_, following in zip(order, (*order[1:], None), strict=True):
        kept = held if following is rounds[-1] else []
        arriving = _empty(base, following.size) if following and not kept else []
        returned = _empty(sums, before.sent.size) if before else []
        messages = [_keys_on(base, arriving, following)] if following and not kept else []
        if before is not None:
            messages.append(((before.sender, share), (before.receiver, returned)))
        exchange = links.along(*messages)
        if round_ is rounds[0]:
            gradients.add(block, round_.intervals, into=sums, frugal=False)
            mine: Tensors = []
        else:
            mine = [torch.zeros_like(x, dtype=sums[0].dtype) for x in block]
            # Beside the buffers of what travels, so that a call takes no more memory with more rounds.
            gradients.add(block, round_.intervals, into=mine, frugal=True)
        exchange.wait()
        if before is not None:
            _add(returned, sums, before.sent)
        block = kept or arriving
        before, share = (None, []) if round_ is rounds[0] else (round_, mine)
    if before is not None:
        returned = _empty(sums, before.sent.size)
        links.along(((before.sender, share), (before.receiver, returned))).wait()
        _add(returned, sums, before.sent)


class _Gradients:
    """Adds the gradients that belong to one block of keys."""

    def __init__(
        self,
        q: Tensor,
        call: AttentionCall,
        *,
        out: Tensor,
        lse: Tensor,
        dout: Tensor,
        dlse: Tensor | None,
        dq: Tensor,
    ) -> None:
        self._q, self._call, self._out, self._lse = q, call, out, lse
        self._dout, self._dlse, self._dq = dout, dlse, dq

    def add(self, block: Tensors, intervals: KeyIntervals, *, into: Tensors, frugal: bool) -> None:
        if not intervals.area:
            return
        attention_backward(
            self._q,
            block[0],
            block[1],
            intervals,
            out=self._out,
            lse=self._lse,
            dout=self._dout,
            dlse=self._dlse,
            scale=self._call.scale,
            softcap=self._call.softcap,
            dq=self._dq,
            dk=into[0],
            dv=into[1],
            backend=self._call.backend,
            frugal=frugal,
        )


def _attend(
    q: Tensor, block: Tensors, intervals: KeyIntervals, call: AttentionCall, *, out: Tensor, lse: Tensor
) -> None:
    if intervals.area:
        attention_forward(
            q,
            block[0],
            block[1],
            intervals,
            scale=call.scale,
            softcap=call.softcap,
            out=out,
            lse=lse,
            backend=call.backend,
        )


def _keys_on(base: Tensors, arriving: Tensors, to: Round) -> tuple[tuple[int, Tensors], tuple[int, Tensors]]:
    """The messages by which the keys of a round get where they are needed."""
    return (to.receiver, _cut(base, to.sent)), (to.sender, arriving)


def _cut(tensors: Tensors, part: Part) -> Tensors:
    return [x[:, part.start : part.stop] for x in tensors] if part != NOTHING else []


def _add(shares: Tensors, sums: Tensors, part: Part) -> None:
    for share, total in zip(shares, sums, strict=False):
        total[:, part.start : part.stop] += share


def _deliver(returning: tuple[Exchange, Tensors, Part], home: Tensors) -> None:
    exchange, shares, part = returning
    exchange.wait()
    _add(shares, home, part)


def _empty(like: Tensors, keys: int) -> list[Tensor]:
    """Uninitialised tensors as `like`, ``[B, S, G, width]``, for so many keys."""
    return [x.new_empty((x.shape[0], keys, *x.shape[2:])) for x in like]


def _each(peer: int, tensors: Tensors) -> list[tuple[int, Tensor]]:
    return [(peer, x) for x in tensors]
