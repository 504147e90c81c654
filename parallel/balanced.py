"""Balanced: packed documents shared out so that every step of a causal ring costs every rank the same.

In step s of a ring, rank r works on the keys of rank r-s (mod W), and the slowest rank sets the pace of the step. So it
is not enough that ranks have the same work in total. Documents are placed one by one, the longest first:

- *Share.* A document goes to the fewest ranks g (g divides W) on which no rank comes out above its part. These lie at
  equal distance W/g around the ring, and the document is cut into 2g chunks, of which each takes one early and one late
  (zigzag): its work then falls evenly on the g ranks and on the steps 0, W/g, 2W/g ... Neighbouring ranks would have
  it in 2g-1 steps, and in each of them only some of the g ranks would work.
- *Rocks.* A document for which g = 1 does stays whole, on the least-loaded rank that has room for it.
- *Sand.* The shortest documents, and ends of others that found no room, are poured last, in order of position, and cut
  at exact tokens: rank r ends with the tokens of `contiguous`, (r+1)*T//W - r*T//W.

How loaded a rank is: its work so far, and its room times the mean work per token of the documents still to come. Short
documents therefore go where there is room. "Above its part" allows a slack: the larger it is, the more documents stay
on few ranks and the fewer keys and values travel. The first attempt has much. The work of each attempt is counted
exactly, and attempts with less slack follow until the steps take at most 5% longer than perfectly even ones (TARGET);
where none gets there, the best is taken. Sequences of many tiles (128 tokens, as in the kernels) are first tried in
whole tiles, so that all runs start on one; in others, cuts are moved to tiles where that costs next to nothing.

Measured in visible pairs, all steps over the ideal, documents of log-normal lengths (median 2K, sigma 1.5), T = 1M, 20
mixes: at most 1.050 with W = 8, 1.049 with W = 64; direct sends of the keys that are seen need 0.15 to 0.35 and 0.25 to
0.48 of a full ring's. At T = 16K and W = 8: one document, 4 equal and 64 of 256 tokens 1.000; 9 of mixed lengths up to
1.047 (300 mixes). It falls short where a rank and step have less than about one tile: T = 256K in 2,600 documents of
about 100 tokens takes 1.10 with W = 64 and 1.24 with W = 130; there a ring in lockstep is the wrong tool. Pairs are not
tiles: 9 mixed documents at T = 16K take 1.95 to 2.38 in tiles of 128 x 128, over the ideal in pairs, as their pieces
are shorter than a tile ("striped:128": 1.22 to 1.32).

Letters: T tokens (`length`), W ranks (`world`), N documents. Work is counted in pairs of a query and a key it sees.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from longtrain.parallel.layout_base import Layout

TARGET = 1.05
"""The time of a pass in lockstep, over the ideal, at which no further attempt is made."""

ATTEMPTS = 4
"""Attempts at most; each takes about as long as the first."""

SLACK = 0.06
"""What a rank may come out above its part at first, over log2 W: a wide ring has more steps to keep even."""

OUTLOOK = 0.95
"""In the first attempt, the work that is expected of a rank's room, over the mean of what is still to come.

Below 1 it trusts that later documents make up for an earlier one, so that fewer of those are shared out.
"""

ALIGNMENT = 0.005
"""What all cuts that are moved to multiples of TILE may cost together, over the ideal."""

TILE = 128

TILES_PER_STEP = 16
"""Tiles per rank and ring step from which attempts with whole tiles come first.

There a document begins where its first whole tile does: what lies before goes with the document ahead.
"""

ROCKS = 16
"""Documents per rank, the longest, that are placed one by one; all shorter ones are sand."""

MEASURED_WORLD = 128
"""With more ranks than this an assignment's work takes too long to count, and the first attempt is taken."""


class Piece(NamedTuple):
    """Columns of equal length: positions [start, stop) of one document, and the rank that holds them."""

    start: np.ndarray
    stop: np.ndarray
    rank: np.ndarray


class Solution(NamedTuple):
    """The assignment of one batch and what it was made for."""

    world: int
    length: int
    cu_seqlens: np.ndarray
    starts: np.ndarray  # where runs of all ranks start, increasing; each ends where the next one starts
    ranks: np.ndarray  # and who holds them
    runs: list[np.ndarray]  # the runs of each rank, [n, 2]

    def fits(self, world: int, length: int, cu_seqlens: np.ndarray) -> bool:
        if (world, length) != (self.world, self.length):
            return False
        # Shards hand in the same read-only array each time: that need not be compared.
        return cu_seqlens is self.cu_seqlens or np.array_equal(cu_seqlens, self.cu_seqlens)


@dataclass(frozen=True)
class Balanced(Layout):
    """Packed documents laid out so that each ring step's causal work is even, and so are the ranks' tokens.

    A pure function of W, T and the documents, solved once per batch: the object keeps the solution of the batch that it
    was last asked about. Its runs are short, so linear mixers refuse it.
    """

    name = "balanced"
    long_segments = False

    _kept: list[Solution] = field(default_factory=list, init=False, repr=False, compare=False)

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return self._solution(world, length, cu_seqlens).runs[rank]

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        solution = self._solution(world, length, cu_seqlens)
        return solution.ranks[np.searchsorted(solution.starts, positions, side="right") - 1]

    def _solution(self, world: int, length: int, cu_seqlens: np.ndarray) -> Solution:
        kept = self._kept[0] if self._kept else None
        if kept is None or not kept.fits(world, length, cu_seqlens):
            kept = _solve(world, length, cu_seqlens)
            self._kept[:] = [kept]
        return kept


def _solve(world: int, length: int, cu_seqlens: np.ndarray) -> Solution:
    pieces = _assign(world, length, cu_seqlens)
    new = np.diff(pieces.rank, prepend=-1) != 0  # neighbours of one rank are one run
    starts, ranks = pieces.start[new], pieces.rank[new]
    columns = np.stack([starts, np.append(starts[1:], length)[: len(starts)]], axis=1)
    by_rank = np.argsort(ranks, kind="stable")
    runs = np.split(columns[by_rank], np.cumsum(np.bincount(ranks, minlength=world))[:-1])
    if cu_seqlens.flags.writeable:  # the caller may write into it; what the solution is for must not change
        cu_seqlens = cu_seqlens.copy()
    return Solution(world, length, cu_seqlens, starts, ranks, runs)


def _assign(world: int, length: int, cu_seqlens: np.ndarray) -> Piece:
    """All pieces of the best attempt, in order of position."""
    if world == 1 or length == 0:
        return Piece(*np.array([[0], [length], [0]])[:, : min(length, 1)])
    slack = SLACK / math.log2(world)
    if world > MEASURED_WORLD:
        return _attempt(world, cu_seqlens, slack=slack, outlook=1.0, alignment=ALIGNMENT)
    on_tiles = np.minimum(-(-cu_seqlens // TILE) * TILE, length)
    if length >= TILES_PER_STEP * TILE * world**2:
        plans = [(on_tiles, OUTLOOK, math.inf), (on_tiles, 1.0, math.inf)]
    else:
        plans = [(cu_seqlens, OUTLOOK, ALIGNMENT)]
    plans += [(cu_seqlens, 1.0, ALIGNMENT)] * (ATTEMPTS - len(plans))
    best, best_time = None, math.inf
    for boundaries, outlook, alignment in plans:
        pieces = _attempt(world, boundaries, slack=slack, outlook=outlook, alignment=alignment)
        time = _lockstep_time(_work(world, pieces, cu_seqlens))
        if time < best_time:
            best, best_time = pieces, time
        if time <= TARGET:
            break
        if boundaries is cu_seqlens:
            # The loss is about proportional to the slack; a little less than that leads to the target.
            slack *= min(max(0.7 * (TARGET - 1) / (time - 1), 0.05), 0.7)
    assert best is not None
    return best


def _attempt(world: int, boundaries: np.ndarray, *, slack: float, outlook: float, alignment: float) -> Piece:
    """Shares out the documents with these boundaries; pieces in order of position."""
    sizes = np.diff(boundaries)
    longest = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    starts, sizes = boundaries[longest], sizes[longest]
    placing = _Placing(world, sizes, slack=slack, outlook=outlook, alignment=alignment)
    rocks = min(ROCKS * world, len(sizes))
    work = sizes * (sizes + 1) / 2
    later_tokens = placing.length - np.cumsum(sizes[:rocks])
    later_work = work.sum() - np.cumsum(work[:rocks])
    per_token = later_work / np.maximum(later_tokens, 1)
    columns = (starts[:rocks], sizes[:rocks], work[:rocks], per_token)
    for start, size, pairs, later in zip(*(column.tolist() for column in columns), strict=True):
        placing.place(start, size, pairs, later)
    placing.pour(starts[rocks:], starts[rocks:] + sizes[rocks:])
    whole = np.array(placing.whole, dtype=np.int64).reshape(-1, 3)
    start, stop, rank = (np.concatenate(column) for column in zip(*placing.shared, tuple(whole.T), strict=True))
    order = np.argsort(start)
    order = order[(start < stop)[order]]
    return Piece(start[order], stop[order], rank[order])


def _cut_at(cu_seqlens: np.ndarray, pieces: Piece) -> Piece:
    """The same pieces cut where documents begin."""
    cuts = np.unique(np.concatenate([pieces.start, pieces.stop, cu_seqlens]))
    holder = np.searchsorted(pieces.start, cuts[:-1], side="right") - 1
    return Piece(cuts[:-1], cuts[1:], pieces.rank[holder])


class _Placing:
    """One attempt: what each rank holds so far, and where the next document goes."""

    def __init__(self, world: int, sizes: np.ndarray, *, slack: float, outlook: float, alignment: float) -> None:
        self.world, self.length, self.outlook = world, int(sizes.sum()), outlook
        self.degrees = [degree for degree in range(1, world + 1) if world % degree == 0]
        self.ideal = float((sizes * (sizes + 1) / 2).sum()) / world  # work of a rank
        self.limit = self.ideal * (1 + slack)
        self.load = np.zeros(world)
        self.room = np.diff(np.arange(world + 1) * self.length // world)
        self.debt = np.zeros(world)  # tokens that aligned cuts have taken from a rank
        self.alignment = alignment  # what aligned cuts may still cost
        self.whole: list[tuple[int, int, int]] = []
        self.shared: list[Piece] = []
        self.sand: list[tuple[int, int]] = []

    def place(self, start: int, size: int, work: float, later: float) -> None:
        """Places one document. later: the mean work per token of all documents that come after it."""
        degree, first = self._ranks_for(size, work, later)
        if degree > 1:
            self._share(start, size, work, degree, first)
        else:
            self.load[first] += work
            self.room[first] -= size
            self.whole.append((start, start + size, first))

    def _ranks_for(self, size: int, work: float, later: float) -> tuple[int, int]:
        """The fewest ranks g that can take the document, as (g, the first of them); all ranks if no fewer can."""
        world, room = self.world, self.room
        expected = self.load + room * later
        hoped = expected - (1 - self.outlook) * later * room if self.outlook < 1 else expected
        lowest, added = float(hoped.min()), work - size * later * self.outlook
        for degree in self.degrees[:-1]:
            tokens = -(-size // degree)
            if tokens > self.length // world or lowest + added / degree > self.limit:
                continue
            if degree == 1:
                highest = np.where(room >= tokens, expected, np.inf)
            else:
                fits = room.reshape(degree, -1).min(axis=0) >= tokens
                highest = np.where(fits, expected.reshape(degree, -1).max(axis=0), np.inf)
            first = int(highest.argmin())
            if highest[first] < math.inf:
                top = float(hoped[first :: world // degree].max())
                if top + added / degree <= self.limit:
                    return degree, first
        return world, 0

    def _share(self, start: int, size: int, work: float, degree: int, first: int) -> None:
        """Cuts the document into a zigzag over `degree` ranks at equal distance, as evenly as their room allows."""
        ranks = np.arange(first, self.world, self.world // degree)
        room = self.room[ranks]
        # Cuts move by half a tile at most, on chunks of size/2g tokens: the relative error, in this document's part.
        cost = TILE * 2 * degree / size * work / (self.ideal * self.world)
        cuts = self._aligned(start, size, ranks) if cost <= self.alignment else None
        if cuts is not None:
            self.alignment -= cost
        else:
            tokens = np.full(degree, size // degree)
            if size % degree:
                tokens[np.argsort(-room, kind="stable")[: size % degree]] += 1
            tokens = np.minimum(tokens, room)
            early = tokens // 2
            cuts = np.cumsum(np.concatenate([[start], early, (tokens - early)[::-1]]))
            if cuts[-1] < start + size:
                self.sand.append((int(cuts[-1]), start + size))
        self.room[ranks] = room - _zigzag_tokens(cuts, degree)
        self.load[ranks] += work / degree
        self.shared.append(Piece(cuts[:-1], cuts[1:], np.concatenate([ranks, ranks[::-1]])))

    def _aligned(self, start: int, size: int, ranks: np.ndarray) -> np.ndarray | None:
        """The cuts of a zigzag at multiples of TILE, its ends aside; None where a rank has no room for that.

        What rounding gives a rank too few, its late chunk makes up for, and then the next document.
        """
        degree = len(ranks)
        wanted = size / degree + self.debt[ranks]
        early = _rounded(start, wanted / 2)
        late = _rounded(int(early[-1]), (wanted - np.diff(early, prepend=start))[::-1])
        late[-1] = start + size
        cuts = np.concatenate([[start], early, late])
        tokens = _zigzag_tokens(cuts, degree)
        if (np.diff(cuts) < 0).any() or (tokens > self.room[ranks]).any():
            return None
        self.debt[ranks] = wanted - tokens
        return cuts

    def pour(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Fills the ranks' room with these documents and with what found no room before, in order of position."""
        left_over = np.array(self.sand, dtype=np.int64).reshape(-1, 2)
        starts, stops = np.append(left_over[:, 0], starts), np.append(left_over[:, 1], stops)
        order = np.argsort(starts)
        starts, stops = starts[order], stops[order]
        # The sand as one line, cut where a document ends and where a rank is full.
        ends, full = np.cumsum(stops - starts), np.cumsum(self.room)
        cuts = np.unique(np.concatenate([[0], ends, full]))
        begin, end = cuts[:-1], cuts[1:]
        document = np.searchsorted(ends, begin, side="right")
        shift = (stops - ends)[document]
        self.shared.append(Piece(begin + shift, end + shift, np.searchsorted(full, begin, side="right")))


def _zigzag_tokens(cuts: np.ndarray, degree: int) -> np.ndarray:
    """The tokens that each of `degree` ranks has of a zigzag with these 2g+1 cuts."""
    chunks = np.diff(cuts)
    return chunks[:degree] + chunks[degree:][::-1]


def _rounded(start: int, chunks: np.ndarray) -> np.ndarray:
    """Where chunks of about these sizes end, from `start` on: the nearest multiples of TILE."""
    return np.rint((start + np.cumsum(chunks)) / TILE).astype(np.int64) * TILE


def _work(world: int, pieces: Piece, cu_seqlens: np.ndarray) -> np.ndarray:
    """Pairs [W, W] of rank r's queries and rank s's keys under a causal mask, counted exactly (in float64)."""
    start, stop, rank = _cut_at(cu_seqlens, pieces)
    size = (stop - start).astype(np.float64)
    work = np.diag(np.bincount(rank, weights=size * (size + 1) / 2, minlength=world))
    document = np.searchsorted(cu_seqlens, start, side="right") - 1
    # Only documents in several pieces have pairs between pieces.
    split = np.flatnonzero(np.bincount(document, minlength=len(cu_seqlens))[document] > 1)
    if split.size:
        size, rank, document = size[split], rank[split], document[split]
        each = np.zeros((len(split), world))
        each[np.arange(len(split)), rank] = size
        so_far = np.cumsum(each, axis=0)  # [pieces, W]: tokens of each rank up to here, earlier documents' too
        first = np.flatnonzero(np.diff(document, prepend=-1))
        last = np.append(first[1:], len(split)) - 1
        earlier = so_far[first] - each[first]
        work += each.T @ so_far - (so_far[last] - earlier).T @ earlier
        work -= np.diag(np.bincount(rank, weights=size**2, minlength=world))  # a piece with itself: counted above
    return work


def _lockstep_time(work: np.ndarray) -> float:
    """The sum over ring steps of the slowest rank's work, over the ideal; 1 is perfect."""
    world = len(work)
    ranks = np.arange(world)
    # [step, rank]: in step s rank r works on the keys of rank r - s.
    steps = work[ranks, (ranks - ranks[:, None]) % world]
    return float(steps.max(axis=1).sum() / (work.sum() / world))
