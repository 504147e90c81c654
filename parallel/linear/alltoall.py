"""Every rank scans a share of the heads over all runs: bytes per rank that do not grow with W, in two messages a pass.

The columns of a state never meet (`mixers.py`), so any share of the H * columns columns can be scanned by itself: a
rank's share is one of W equal parts, of whole heads where W divides H. The first message brings each rank its columns
of all runs' summaries, with the transitions of their heads; the second brings every rank the columns of what enters its
runs. With s the bytes of a state and t those of a transition, a rank receives less than 2 s + t for each run in forward
(and s for the state after the last token), 2 s in backward, whatever W and T.

Letters: R slots, E states that a message holds, U columns and h heads of a share; `mixers.py` for the rest.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.parallel.communication import Handle, all_to_all_parts, start_all_to_all_parts
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.mixers import carry
from longtrain.parallel.scan import combine_state_gradients, combine_states


class _Share(NamedTuple):
    """A rank's columns [start, stop), counted over all heads, and the heads [first, last) that they are in."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def heads(self) -> slice:
        return slice(self.first, self.last)


def states(
    transition: Tensor, state: Tensor, initial: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
    """As `allgather.states`; kept are the transitions of all runs for the heads of this rank's share."""
    plan, world, columns = call.plan, call.shard.world, state.shape[-1]
    own = _share(plan.rank, call, columns)
    by_head = transition.movedim(2, 0)  # [H, R, B, *transition]
    arriving = _scatter(state, by_head, call)
    meanwhile()
    summaries, transitions = _arrived(arriving, state, call)
    transitions = transitions.view(world, own.last - own.first, *by_head.shape[1:]).movedim(1, 3)
    entering, final = combine_states(
        plan,
        summaries,
        lambda run, x: carry(transitions[run.rank, run.slot], x),
        None if initial is None else initial[:, own.heads],
        ranks=range(world),
    )
    ends: list[Tensor] = []
    if call.return_state:
        ends.append(summaries.new_zeros(summaries.shape[2:]) if final is None else final)
    returned = [[entering[rank, slot] for slot in plan.continuing[rank]] + ends for rank in range(world)]
    found = _returned(returned, columns, call)
    by_slot: list[Tensor | None] = [None] * len(plan.first)
    if plan.starts:
        by_slot[plan.runs[0].slot] = initial
    for slot, x in zip(plan.continuing[plan.rank], found, strict=False):
        by_slot[slot] = x
    return by_slot, found[-1] if call.return_state else None, transitions


def gradients(
    own: Tensor, kept: Tensor, dfinal: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None]:
    """As `allgather.gradients`; every rank has a part of the initial state's gradient, that of its share."""
    plan, world, columns = call.plan, call.shard.world, own.shape[-1]
    message = own if dfinal is None else torch.cat([own, dfinal.unsqueeze(0)])
    arriving = _scatter(message, None, call)
    meanwhile()
    summaries, _ = _arrived(arriving, message, call)
    leaving, dinitial = combine_state_gradients(
        plan,
        summaries,
        lambda run, x: carry(kept[run.rank, run.slot], x, backward=True),
        None if dfinal is None else summaries[:, -1].sum(0),
        ranks=range(world),
    )
    slots = [plan.continued[rank] for rank in range(world)]
    if dfinal is not None:
        last = plan.runs[-1]
        slots[last.rank] = (*slots[last.rank], last.slot)
    returned = [[leaving[rank, slot] for slot in slots[rank]] for rank in range(world)]
    by_slot: list[Tensor | None] = [None] * len(plan.first)
    for slot, x in zip(slots[plan.rank], _returned(returned, columns, call), strict=True):
        by_slot[slot] = x
    if dinitial is None or not call.initial_gradient:
        return by_slot, None
    share = _share(plan.rank, call, columns)
    part = _to_columns(own.new_zeros(own.shape[1:]).unsqueeze(0))
    part[share.columns] = _own_columns(dinitial.unsqueeze(0), share)
    return by_slot, _from_columns(part, columns)[0]


def kept_shape(call: ScanCall) -> tuple[int, ...]:
    """``[W, R, B, h, *transition]``."""
    sizes, share = call.sizes, _share(call.plan.rank, call, call.sizes.columns)
    return call.shard.world, call.plan.slots, sizes.batch, share.last - share.first, *sizes.transition


def _share(rank: int, call: ScanCall, columns: int) -> _Share:
    """The heads of a share do not depend on the number of columns: kept transitions serve every part of them."""
    heads, world = call.sizes.heads, call.shard.world
    ends = [end * heads * columns // world for end in (rank, rank + 1)]
    return _Share(ends[0], ends[1], rank * heads // world, -(-(rank + 1) * heads // world))


def _scatter(x: Tensor, by_head: Tensor | None, call: ScanCall) -> Handle:
    """Send every rank its columns of x ``[E, B, H, rows, columns]`` and its heads of `by_head` ``[H, ...]``."""
    by_column, parts = _to_columns(x), []
    for rank in range(call.shard.world):
        share = _share(rank, call, x.shape[-1])
        parts += [by_column[share.columns], by_head[share.heads]] if by_head is not None else [by_column[share.columns]]
    step = 1 if by_head is None else 2
    sizes = [sum(part.numel() for part in parts[n : n + step]) for n in range(0, len(parts), step)]
    message = torch.cat([part.flatten() for part in parts])
    return start_all_to_all_parts(message, sizes, [sizes[call.plan.rank]] * len(sizes), call.shard.group)


def _arrived(arriving: Handle, x: Tensor, call: ScanCall) -> tuple[Tensor, Tensor]:
    """What all ranks sent of their `x`: ``[W, E, B, h, rows, columns]``, zeros outside the share; and the rest."""
    count, batch, _, rows, columns = x.shape
    share, world = _share(call.plan.rank, call, columns), call.shard.world
    mine, heads = share.stop - share.start, share.last - share.first
    received = arriving.wait().view(world, -1)
    sent, rest = received.tensor_split([mine * count * batch * rows], dim=1)
    whole = sent.reshape(world, mine, count, batch, rows)
    if mine != heads * columns:
        begin = share.start - share.first * columns
        whole, part = received.new_zeros((world, heads * columns, count, batch, rows)), whole
        whole[:, begin : begin + mine] = part
    return whole.view(world, heads, columns, count, batch, rows).permute(0, 3, 4, 1, 5, 2), rest


def _returned(states: Sequence[Sequence[Tensor | None]], columns: int, call: ScanCall) -> list[Tensor]:
    """Send every rank this share of some states ``[B, h, rows, columns]``; the states sent here, all heads of them."""
    sizes, rank = call.sizes, call.plan.rank
    share, per_column = _share(rank, call, columns), sizes.batch * sizes.rows
    parts = [
        _own_columns(torch.stack([x for x in of_rank if x is not None]), share).flatten()
        for of_rank in states
        if of_rank
    ]
    mine, count = share.stop - share.start, len(states[rank])
    send = [mine * len(of_rank) * per_column for of_rank in states]
    shares = [_share(other, call, columns) for other in range(call.shard.world)]
    receive = [(other.stop - other.start) * count * per_column for other in shares]
    arrived = all_to_all_parts(torch.cat(parts), send, receive, call.shard.group)
    by_column = arrived.view(sizes.heads * columns, count, sizes.batch, sizes.rows)
    return list(_from_columns(by_column, columns).unbind(0))


def _own_columns(x: Tensor, share: _Share) -> Tensor:
    """x ``[E, B, h, rows, columns]`` of a share's heads -> its columns ``[U, E, B, rows]``."""
    begin = share.start - share.first * x.shape[-1]
    return _to_columns(x)[begin : begin + share.stop - share.start]


def _to_columns(x: Tensor) -> Tensor:
    """``[E, B, H, rows, columns]`` -> ``[H * columns, E, B, rows]``, a copy."""
    return x.permute(2, 4, 0, 1, 3).contiguous().flatten(0, 1)


def _from_columns(x: Tensor, columns: int) -> Tensor:
    """The reverse of `_to_columns`, a view."""
    return x.unflatten(0, (-1, columns)).permute(2, 3, 0, 4, 1)
