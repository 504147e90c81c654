"""The halo: the few tokens before each of a rank's runs, which other ranks hold, and the way back for their gradients.

What mixes a token with the few before it (a short convolution, a token shift) needs, at the start of a run of
consecutive tokens, the last tokens of the runs before it, as far as the document goes on there. Where runs are shorter
than the halo, it comes from several of them; some may be this rank's own. Which tokens go where is host data that every
rank derives from its shard. Only these tokens travel, each from the rank that holds it to the rank whose run needs it.

Letters: B batch, T_w tokens on this rank, E runs of this rank that have a halo, in order.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from longtrain.parallel.communication import Exchange, Group
from longtrain.parallel.scan import Run, ScanPlan, scan_plan
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True)
class HaloPiece:
    """Consecutive tokens of one run that stand in the halo of another."""

    source: int  # the rank that holds them
    start: int  # local index there, of the first of them
    target: int  # the rank whose run needs them
    entry: int  # which of its halos, 0 ... E-1
    row: int  # where in that halo the first of them stands
    count: int


@dataclass(frozen=True, eq=False)
class HaloPlan:
    """What a rank sends and receives, and for which of its runs.

    reach: the tokens of a whole halo. slots: the runs (by slot of the scan plan) that have one. counts: for each of
    them, how many tokens it holds, the last ones of `reach`; fewer where the document began later. sends, receives:
    pieces in order of their reader's and then of their own position; those that stay on this rank are in both.
    """

    scan: ScanPlan
    reach: int
    slots: tuple[int, ...]
    counts: tuple[int, ...]
    sends: tuple[HaloPiece, ...]
    receives: tuple[HaloPiece, ...]


def halo_plan(shard: SequenceShard, reach: int) -> HaloPlan:
    """The plan for a halo of `reach` tokens; kept on the shard. Refuses, with a ValueError, layouts of short runs."""
    kept = shard.plans.setdefault(shard, {})
    key = ("halo", reach)
    if key not in kept:
        kept[key] = _plan(shard, reach)
    return kept[key]


def _plan(shard: SequenceShard, reach: int) -> HaloPlan:
    scan = scan_plan(shard)
    starts: list[int] = np.unique(shard.cu_seqlens).tolist()
    held = [0] * shard.world  # tokens of each rank in the runs so far: the local index of its next run
    entries = [0] * shard.world
    first: list[int] = []  # local index of each run's first token on its rank
    slots, counts, pieces = [], [], []
    for index, run in enumerate(scan.runs):
        first.append(held[run.rank])
        held[run.rank] += run.stop - run.start
        if not run.continues or not reach:
            continue
        begin = max(run.start - reach, starts[bisect_right(starts, run.start) - 1])
        pieces += _pieces(scan.runs, first, index, begin, entries[run.rank], reach)
        entries[run.rank] += 1
        if run.rank == shard.rank:
            slots.append(run.slot)
            counts.append(run.start - begin)
    return HaloPlan(
        scan=scan,
        reach=reach,
        slots=tuple(slots),
        counts=tuple(counts),
        sends=tuple(piece for piece in pieces if piece.source == shard.rank),
        receives=tuple(piece for piece in pieces if piece.target == shard.rank),
    )


def _pieces(
    runs: Sequence[Run], first: Sequence[int], index: int, begin: int, entry: int, reach: int
) -> list[HaloPiece]:
    """What the halo of runs[index], from position `begin` on, takes from the runs before it, in order of position."""
    reader, pieces = runs[index], []
    for before in range(index - 1, -1, -1):
        run = runs[before]
        start = max(run.start, begin)
        pieces.append(
            HaloPiece(
                source=run.rank,
                start=first[before] + start - run.start,
                target=reader.rank,
                entry=entry,
                row=reach - (reader.start - start),
                count=run.stop - start,
            )
        )
        if start == begin:
            break
    return pieces[::-1]


class HaloExchange:
    """Halos under way; `wait` returns them.

    x ``[B, T_w, ...]``: this rank's tokens. All ranks of the group make one at the same time.
    """

    def __init__(self, x: Tensor, plan: HaloPlan, group: Group) -> None:
        self._plan = plan
        self._halo = x.new_zeros((x.shape[0], len(plan.slots), plan.reach, *x.shape[2:]))
        self._received = [(piece, x.new_empty((x.shape[0], piece.count, *x.shape[2:]))) for piece in plan.receives]
        sends = [(piece.target, x[:, piece.start : piece.start + piece.count]) for piece in plan.sends]
        self._exchange = Exchange(sends, [(piece.source, part) for piece, part in self._received], group)

    def wait(self) -> Tensor:
        """``[B, E, reach, ...]`` in x's dtype: the tokens before each run, zeros where its document had not begun."""
        self._exchange.wait()
        for piece, part in self._received:
            self._halo[:, piece.entry, piece.row : piece.row + piece.count] = part
        return self._halo


class HaloGradientExchange:
    """The halos' gradients under way to the ranks whose tokens they are; `wait` returns what came for this rank's.

    dhalo ``[B, E, reach, ...]``: the gradient of what `HaloExchange` gave, in the dtype that it shall travel in.
    """

    def __init__(self, dhalo: Tensor, plan: HaloPlan, group: Group) -> None:
        self._received = [
            (piece, dhalo.new_empty((dhalo.shape[0], piece.count, *dhalo.shape[3:]))) for piece in plan.sends
        ]
        sends = [(piece.source, dhalo[:, piece.entry, piece.row : piece.row + piece.count]) for piece in plan.receives]
        self._exchange = Exchange(sends, [(piece.target, part) for piece, part in self._received], group)

    def wait(self) -> list[tuple[int, Tensor]]:
        """(local index of the first token, its and the following tokens' gradients ``[B, count, ...]``), to be summed.

        A token may come several times, in order of its readers. Each part ends with the last token of a run.
        """
        self._exchange.wait()
        return [(piece.start, part) for piece, part in self._received]
