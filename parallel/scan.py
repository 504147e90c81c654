"""Scans over ranks: how the runs of all ranks follow one another, and how their summaries are combined.

A linear mixer carries a state along each document. A rank holds few runs of consecutive tokens (one for contiguous,
two for zigzag), cut at document boundaries into segments. Only a run's first segment receives a state from elsewhere
and only its last one hands a state on, so a run is summed up by one (transition, state) pair however many documents it
holds, and which run continues which document is host data that every rank derives from its shard. Summaries are
combined in position order: forward for states, backward for the states' gradients.

Letters: R slots per rank (the most runs that any rank holds, so that all ranks' messages have one size).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from torch import Tensor

from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True)
class Run:
    """A maximal run of consecutive positions on one rank."""

    rank: int
    slot: int  # which of the rank's runs, from 0
    start: int  # position of its first token
    stop: int
    continues: bool  # its first token continues the document of the token before it, on another rank
    passes: bool  # one document from its first to its last token: a state that enters it also leaves it


Through = Callable[[Run, Tensor], Tensor]
"""(run, x) -> x carried through that run: by its transition, or by the transposed one in backward."""
OfRuns = dict[tuple[int, int], Tensor | None]
"""By (rank, slot) what enters a run, or the gradient of what leaves it; None is zero."""


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """What every rank knows, without a message, about a scan over a shard's runs.

    runs: all ranks' runs in position order. slots: R. offsets: int64 [N+1], this rank's segments in local indices, one
    empty segment where the rank holds nothing. first, last: for each of this rank's runs, by slot, the index of its
    first and of its last segment.
    """

    rank: int
    world: int
    runs: tuple[Run, ...]
    slots: int
    offsets: np.ndarray
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def crosses(self) -> bool:
        """Whether any document goes on from one run to another, so that states have to cross."""
        return any(run.continues for run in self.runs)

    @property
    def starts(self) -> bool:
        """Whether this rank holds the first token."""
        return bool(self.runs) and self.runs[0].rank == self.rank

    @cached_property
    def continuing(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the slots of the runs that go on with the document of the run before, in position order."""
        return self._slots([run for run in self.runs if run.continues])

    @cached_property
    def continued(self) -> tuple[tuple[int, ...], ...]:
        """By rank, the slots of the runs whose document goes on in the run behind, in position order."""
        return self._slots([run for run, after in pairwise(self.runs) if after.continues])

    def _slots(self, runs: Sequence[Run]) -> tuple[tuple[int, ...], ...]:
        slots: list[list[int]] = [[] for _ in range(self.world)]
        for run in runs:
            slots[run.rank].append(run.slot)
        return tuple(map(tuple, slots))

    def entered(self, *, initial: bool) -> tuple[bool, ...]:
        """By slot, whether a state enters this rank's run. initial: whether one enters the sequence."""
        entered = [False] * len(self.first)
        for index, run in enumerate(self.runs):
            if run.rank == self.rank:
                entered[run.slot] = run.continues or (initial and index == 0)
        return tuple(entered)


def scan_plan(shard: SequenceShard) -> ScanPlan:
    """The plan of a scan over `shard`, made once; refuses, with a ValueError, layouts that do not keep runs long."""
    kept = shard.plans.setdefault(shard, {})
    key = ("scan",)
    if key not in kept:
        kept[key] = _plan(shard)
    return kept[key]


def _plan(shard: SequenceShard) -> ScanPlan:
    layout = shard.layout
    if not layout.long_segments:
        raise ValueError(
            f"shard: got layout {layout.name!r}, whose runs of consecutive tokens are short; a scan over ranks needs "
            "long ones: move the tensors with shard.relayout(x, shard.with_layout('contiguous'), dim=1), or 'zigzag', "
            "and the result back"
        )
    # Where documents start, empty ones dropped; the last entry is the sequence's end.
    starts: list[int] = np.unique(shard.cu_seqlens).tolist()
    held = [
        _maximal_runs(layout.runs(rank, shard.world, shard.length, shard.cu_seqlens)) for rank in range(shard.world)
    ]
    runs = [
        _run(rank, slot, start, stop, starts=starts)
        for rank, runs_of_rank in enumerate(held)
        for slot, (start, stop) in enumerate(runs_of_rank)
    ]
    offsets, first, last = [0], [], []
    for start, stop in held[shard.rank]:
        origin = offsets[-1] - start  # local index minus position, within this run
        first.append(len(offsets) - 1)
        offsets += [cut + origin for cut in starts[bisect_right(starts, start) : bisect_left(starts, stop)]]
        offsets.append(stop + origin)
        last.append(len(offsets) - 2)
    return ScanPlan(
        rank=shard.rank,
        world=shard.world,
        runs=tuple(sorted(runs, key=lambda run: run.start)),
        slots=max(map(len, held)),
        offsets=np.array(offsets if first else [0, 0], dtype=np.int64),
        first=tuple(first),
        last=tuple(last),
    )


def combine_states(
    plan: ScanPlan, states: Tensor, through: Through, initial: Tensor | None, *, ranks: Container[int]
) -> tuple[OfRuns, Tensor | None]:
    """Carry states forward over all runs in position order.

    states ``[W, R, ...]``: what each run's last segment reaches from a zero initial state. initial: the state before
    the first token; None is zero. Returns what enters each run of `ranks`, and the state after the last token (None: no
    token, no initial state). A state never meets another document's, not even multiplied by zero.
    """
    entering: OfRuns = {}
    carried = initial
    for index, run in enumerate(plan.runs):
        incoming = carried if run.continues or index == 0 else None
        if run.rank in ranks:
            entering[run.rank, run.slot] = incoming
        carried = handed_on(run, states[run.rank, run.slot], incoming, through)
    return entering, carried


def combine_state_gradients(
    plan: ScanPlan, gradients: Tensor, through: Through, final: Tensor | None, *, ranks: Container[int]
) -> tuple[OfRuns, Tensor | None]:
    """Carry the gradients of states backward over all runs, in reverse position order.

    gradients ``[W, R, ...]``: of the state that enters each run, from the outputs of the run's own first segment.
    final: the gradient of the state after the last token, or None. Returns the gradients of what leaves each run of
    `ranks`, and of the state before the first token.
    """
    leaving: OfRuns = {}
    carried = final
    for index, run in reversed(list(enumerate(plan.runs))):
        if run.rank in ranks:
            leaving[run.rank, run.slot] = carried
        own = handed_on(run, gradients[run.rank, run.slot], carried, through)
        carried = own if run.continues or index == 0 else None
    return leaving, carried


def handed_on(run: Run, own: Tensor, received: Tensor | None, through: Through) -> Tensor:
    """What a run hands on: its own, and what it received and lets pass."""
    return own + through(run, received) if run.passes and received is not None else own


def _run(rank: int, slot: int, start: int, stop: int, *, starts: list[int]) -> Run:
    after = bisect_right(starts, start)  # the first document that starts behind the run's first token
    continues, passes = starts[after - 1] != start, after == bisect_left(starts, stop)
    return Run(rank=rank, slot=slot, start=start, stop=stop, continues=continues, passes=passes)


def _maximal_runs(runs: np.ndarray) -> list[tuple[int, int]]:
    """Runs [n, 2] as Python pairs, empty ones dropped and adjacent ones joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in runs.tolist():
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
