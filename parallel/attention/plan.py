"""The plan of a call: what this rank computes, sends and receives in every step. Host data, made once per batch.

The ranks stand in rows (a node, say) of I places; O rows, W = O * I. In outer step u, a row works on the keys of the
row u before it; each rank holds the part of one block of them that its row needs, its base, and in inner step s works
on the base of the rank s places before it. So a block crosses from row to row once, and the links inside a row carry it
to the others there (Gu et al. 2024, "LoongTrain: Efficient Training of Long-Sequence LLMs with Head-Context
Parallelism", has the same two rings). A plain group is one row, O = 1: the ring of Ring Attention.

Blocks are not handed on from rank to rank. Each rank sends of its base what the receiver's queries see, and nothing to
those who see nothing: windows and packed documents send less than a ring that relays would.
"""

from dataclasses import dataclass

import numpy as np

from longtrain.kernels.intervals import KeyIntervals
from longtrain.parallel.attention.call import Window
from longtrain.parallel.attention.needs import NOTHING, Needs, Part
from longtrain.parallel.heads import teams
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True, eq=False)
class Round:
    """An inner step: the keys that this rank works on, and how they come here."""

    size: int  # keys that come here: what this rank sees of the sender's base
    intervals: KeyIntervals  # which of them each query sees
    sender: int  # in the row; this rank itself in the first round
    receiver: int  # in the row: gets `sent` of this rank's base
    sent: Part


@dataclass(frozen=True, eq=False)
class Stage:
    """An outer step: the base that this rank holds, how it comes here, and the rounds over the row's bases."""

    size: int  # keys of the base: what this row sees of the sender's block
    sender: int  # row; this rank's own in the first stage, whose base is its own block
    receiver: int  # row: gets `sent` of this rank's own block
    sent: Part
    rounds: tuple[Round, ...]


@dataclass(frozen=True, eq=False)
class RingPlan:
    """Ring attention's steps for this rank."""

    stages: tuple[Stage, ...]

    @property
    def travels(self) -> bool:
        """Whether there are other ranks: otherwise nothing is sent."""
        return sum(len(stage.rounds) for stage in self.stages) > 1

    @property
    def last_size(self) -> int:
        """Keys that this rank works on at the end of forward."""
        return self.stages[-1].rounds[-1].size


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """Which of each rank's keys this rank's queries see, and which of its keys each rank's queries see."""

    intervals: tuple[KeyIntervals, ...]
    seen: tuple[Part, ...]  # of the keys of each rank
    shown: tuple[Part, ...]  # of this rank's keys, to each rank


def ring_plan(shard: SequenceShard, key_shard: SequenceShard, *, causal: bool, window: Window, degree: int) -> RingPlan:
    """The ring's plan where neighbouring ranks, `degree` at a time, hold their tokens together (Ulysses inside it).

    degree: 1 for none; it divides the ranks of a row. Places in a row count such teams.
    """
    queries = teams(shard, degree)
    keys = queries if key_shard is shard else teams(key_shard, degree)
    needs = Needs(queries, keys, causal=causal, window=window)
    inner = queries.grid.inner_size
    outer = queries.grid.outer_size
    row, place = divmod(queries.rank, inner)

    def needed(reader_row: int, holder: int) -> Part:
        return needs.hull(range(reader_row * inner, (reader_row + 1) * inner), holder)

    stages = []
    for u in range(outer):
        sender, receiver = (row - u) % outer, (row + u) % outer

        def base_of(other: int, sender: int = sender, u: int = u) -> tuple[int, Part]:
            """The rank whose keys someone in this row has as a base, and which of them."""
            holder = sender * inner + other
            return holder, Part(0, keys.lengths[holder]) if u == 0 else needed(row, holder)

        holder, base = base_of(place)
        rounds = []
        for s in range(inner):
            left, right = (place - s) % inner, (place + s) % inner
            source, whole = base_of(left)
            mine = whole if s == 0 else needs.part(queries.rank, source)
            intervals = queries.intervals(
                source, key_shard=None if keys is queries else keys, causal=causal, window=window
            )
            sent = NOTHING if s == 0 else needs.part(row * inner + right, holder).within(base)
            rounds.append(Round(mine.size, _within(intervals, mine), left, right, sent))
        sent = NOTHING if u == 0 else needed(receiver, queries.rank)
        stages.append(Stage(base.size, sender, receiver, sent, tuple(rounds)))
    return RingPlan(tuple(stages))


def gather_plan(
    shard: SequenceShard, key_shard: SequenceShard, *, causal: bool, window: Window, degree: int = 1
) -> GatherPlan:
    """The plan of a call that gathers all keys; ranks exchange no heads, degree is 1."""
    needs = Needs(shard, key_shard, causal=causal, window=window)
    keys = None if key_shard is shard else key_shard
    ranks = range(shard.world)
    return GatherPlan(
        tuple(shard.intervals(rank, key_shard=keys, causal=causal, window=window) for rank in ranks),
        tuple(needs.part(shard.rank, rank) for rank in ranks),
        tuple(needs.part(rank, shard.rank) for rank in ranks),
    )


def _within(intervals: KeyIntervals, part: Part) -> KeyIntervals:
    """The same intervals counted from the start of a part that holds all visible keys."""
    if part == (0, intervals.keys):
        return intervals
    # Queries that see nothing may stand outside of the part.
    lo, hi = (np.clip(ends - part.start, 0, part.size) for ends in (intervals.lo, intervals.hi))
    return KeyIntervals(lo, hi, part.size)
