"""Layouts: which token positions of a sequence each rank holds.

A layout names, for every rank, runs of consecutive positions. Each rank keeps its tokens in increasing position,
whatever the layout; that is what makes every mask one interval of keys per query (`longtrain.kernels.intervals`).
A layout of your own is a class with the one method `runs` (the others are there, and faster in closed form):

    class LastFirst(Layout):                   # the ranks in reverse order
        def runs(self, rank, world, length, cu_seqlens):
            chunk = world - 1 - rank
            return np.array([[chunk * length // world, (chunk + 1) * length // world]])   # [n, 2] int64

Letters: T tokens of the whole sequence (`length`), W ranks that share it (`world`). Cuts are balanced: cut i of n lies
at i*T//n, so parts differ by at most one token, and any T and W work, T < W (empty shards) included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from longtrain.parallel.balanced import Balanced
from longtrain.parallel.layout_base import Layout, positions_in_runs
from longtrain.parallel.layout_base import count_in_runs as count_in_runs


@dataclass(frozen=True)
class Contiguous(Layout):
    """Rank r holds one run, from r*T//W to (r+1)*T//W. Simple; unbalanced under a causal mask."""

    name = "contiguous"
    long_segments = True

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.array([[_cut(rank, world, length), _cut(rank + 1, world, length)]], dtype=np.int64)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return _count_chunk(positions, rank, world, length)

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return _chunk_of(positions, world, length)


@dataclass(frozen=True)
class Zigzag(Layout):
    """The sequence in 2W chunks; rank r holds chunks r and 2W-1-r, one early and one late.

    Under a causal mask over one long document every rank has the same work in every ring step. It keeps two long
    runs, so linear mixers can run on it too.
    """

    name = "zigzag"
    long_segments = True

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        chunks = 2 * world
        first, last = rank, chunks - 1 - rank
        return np.array(
            [[_cut(chunk, chunks, length), _cut(chunk + 1, chunks, length)] for chunk in (first, last)], dtype=np.int64
        )

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        chunks = 2 * world
        return _count_chunk(positions, rank, chunks, length) + _count_chunk(
            positions, chunks - 1 - rank, chunks, length
        )

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        chunk = _chunk_of(positions, 2 * world, length)
        return np.minimum(chunk, 2 * world - 1 - chunk)


@dataclass(frozen=True)
class BlockCyclic(Layout):
    """Blocks of `width` tokens dealt to the ranks in turn: rank r holds blocks r, r+W, r+2W ... ("striped").

    Width 1 is Striped Attention (Brandon et al., 2023, https://arxiv.org/abs/2311.09431, section 3). The last block may
    be short. Balanced under a causal mask for any documents longer than W blocks, but the runs are short.
    """

    width: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or not isinstance(self.width, int) or self.width < 1:
            raise ValueError(f"width: got {self.width!r}, expected a whole number of tokens from 1 on")
        object.__setattr__(self, "name", "striped" if self.width == 1 else f"striped:{self.width}")

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        starts = np.arange(rank * self.width, length, world * self.width, dtype=np.int64)
        return np.stack([starts, np.minimum(starts + self.width, length)], axis=1)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        width, cycle = self.width, world * self.width
        if width == 1:  # the same number with one division and nothing else
            return (positions + (world - 1 - rank)) // world
        whole_cycles = positions // cycle
        return whole_cycles * width + np.clip(positions - whole_cycles * cycle - rank * width, 0, width)

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return positions // self.width % world


@dataclass(frozen=True)
class Cuts(Layout):
    """Rank r holds one run, from `bounds[r]` to `bounds[r + 1]`: a contiguous layout cut where somebody needs it.

    bounds: W + 1 whole numbers that never decrease, from 0 to T.
    """

    bounds: tuple[int, ...]
    long_segments = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(int(bound) for bound in self.bounds))
        object.__setattr__(self, "name", f"cuts at {', '.join(map(str, self.bounds[1:-1]))}")

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.array([self.bounds[rank : rank + 2]], dtype=np.int64)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        start, stop = self.bounds[rank : rank + 2]
        return np.clip(positions, start, stop) - start

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.array(self.bounds[1:]), positions, side="right")


@dataclass(frozen=True)
class Repeated(Layout):
    """A sequence cut at `bounds`, `copies` times in a row: rank r holds its run of the first copy, of the second ...

    What has as many keys of its own for each copy (heads that see different tokens, say) is then one sequence, whose
    copies are documents. bounds: W + 1 whole numbers that never decrease, from 0 to the length of one copy.
    """

    bounds: tuple[int, ...]
    copies: int
    long_segments = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", tuple(int(bound) for bound in self.bounds))
        object.__setattr__(self, "name", f"{self.copies} copies of cuts at {', '.join(map(str, self.bounds[1:-1]))}")

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        starts = np.arange(self.copies, dtype=np.int64) * self.bounds[-1]
        return np.stack([starts + self.bounds[rank], starts + self.bounds[rank + 1]], axis=1)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        start, stop = self.bounds[rank : rank + 2]
        copy, inside = np.divmod(positions, max(self.bounds[-1], 1))
        return copy * (stop - start) + np.clip(inside, start, stop) - start

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.searchsorted(np.array(self.bounds[1:]), positions % max(self.bounds[-1], 1), side="right")


@dataclass(frozen=True, eq=False)
class Marked(Layout):
    """Keys that are not the tokens of a sequence but stand in it: `each` keys at every mark, seen from there on.

    Only for the keys of attention, by strategies "ring" and "allgather", which ask no more of a layout than to count:
    a query at position i of a document sees the keys with marks in it up to i. A chunk's keys marked where the next one
    begins, say, are seen from outside of the chunk only.

    marks: for each rank int64, never decreasing: positions in its sequence, several of which may be the same.
    """

    marks: tuple[np.ndarray, ...]
    each: int
    name = "marked"

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        """Its marks, which tell it apart from others: no runs of tokens."""
        return np.stack([self.marks[rank], self.marks[rank] + self.each], axis=1)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return self.each * np.searchsorted(self.marks[rank], positions, side="left").astype(np.int64)

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        raise ValueError(f"layout {self.name!r}: its keys have no positions of their own, so no position has an owner")


@dataclass(frozen=True)
class Merged(Layout):
    """`degree` neighbouring ranks of another layout as one: rank r holds what ranks r*degree ... of `base` hold."""

    base: Layout
    degree: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{self.degree} ranks of {self.base.name}")

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        held = [self.base.runs(member, world * self.degree, length, cu_seqlens) for member in self._members(rank)]
        runs = np.concatenate(held)
        runs = runs[np.lexsort((runs[:, 1], runs[:, 0]))]  # an empty run before the one that starts where it does
        # Neighbours in one: in the next run's start, and the run's own stop.
        first = np.append(True, runs[1:, 0] != runs[:-1, 1])[: len(runs)]
        last = np.append(first[1:], True)[: len(runs)]
        return np.stack([runs[first, 0], runs[last, 1]], axis=1)

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        counts = (
            self.base.count(positions, member, world * self.degree, length, cu_seqlens)
            for member in self._members(rank)
        )
        return sum(counts, np.zeros_like(positions))

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return self.base.owners(positions, world * self.degree, length, cu_seqlens) // self.degree

    def _members(self, rank: int) -> range:
        return range(rank * self.degree, (rank + 1) * self.degree)


_NAMED: dict[str, Callable[[], Layout]] = {
    "contiguous": Contiguous,
    "zigzag": Zigzag,
    "striped": BlockCyclic,
    "balanced": Balanced,
}


def layout_names() -> tuple[str, ...]:
    """The names that `layout_named` knows; "striped:w", blocks of w tokens, stands for any w from 1 on."""
    return (*_NAMED, "striped:w")


def layout_named(layout: str | Layout) -> Layout:
    """The layout of this name: "contiguous", "zigzag", "striped", "striped:128" (blocks of 128), "balanced".

    A `Layout` is itself. Anything else is a ValueError that says the nearest name.
    """
    if isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise ValueError(f"layout: got {layout!r}, expected a name ({', '.join(layout_names())}) or a Layout")
    if layout in _NAMED:
        return _NAMED[layout]()
    head, colon, width = layout.partition(":")
    if head == "striped" and colon:
        if width.isascii() and width.isdigit() and int(width) > 0:
            return BlockCyclic(int(width))
        raise ValueError(
            f"layout: got {layout!r}, expected a block width from 1 on after 'striped:', as in 'striped:128'"
        )
    if colon and head in _NAMED:
        raise ValueError(f"layout: got {layout!r}, but {head!r} takes no width; only 'striped:w' does")
    near = get_close_matches(head.strip().lower(), _NAMED, n=1, cutoff=0.5)
    hint = f"did you mean {near[0] + colon + width!r}? " if near else ""
    raise ValueError(f"layout: got {layout!r}; {hint}it can be {', '.join(layout_names())} or a Layout object")


def is_built_in(layout: Layout) -> bool:
    """Whether a layout is one of the library's, whose name says all and which give every position to one rank."""
    if isinstance(layout, Merged):
        return is_built_in(layout.base)
    return type(layout) in (Contiguous, Zigzag, BlockCyclic, Cuts, Repeated, Balanced)


def check_partition(layout: Layout, world: int, length: int, cu_seqlens: np.ndarray) -> None:
    """Refuse, with a ValueError, a layout that does not give every position to exactly one rank.

    longtrain's own layouts do by construction and are not looked at (the keys of `Marked` have no positions of their
    own); one of the user's costs O(T) here.
    """
    if isinstance(layout, Cuts):
        bounds = layout.bounds
        if len(bounds) != world + 1 or (bounds[0], bounds[-1]) != (0, length) or list(bounds) != sorted(bounds):
            raise ValueError(f"bounds: got {bounds}, expected {world + 1} that never decrease, from 0 to {length}")
    if is_built_in(layout) or isinstance(layout, Marked):
        return
    holder = np.full(length, -1, dtype=np.int64)
    for rank in range(world):
        runs = layout.runs(rank, world, length, cu_seqlens)
        where = f"layout {layout.name!r}, rank {rank} of {world}, length {length}"
        if not isinstance(runs, np.ndarray):
            raise ValueError(f"{where}: runs() got {type(runs).__name__}, expected a numpy array, int64 [n, 2]")
        if runs.dtype != np.int64 or runs.ndim != 2 or runs.shape[1] != 2:
            raise ValueError(f"{where}: runs() got {runs.dtype} {list(runs.shape)}, expected int64 [n, 2]")
        ends = runs.reshape(-1)
        if ends.size and (ends[0] < 0 or ends[-1] > length or (ends[1:] < ends[:-1]).any()):
            raise ValueError(f"{where}: runs() must be increasing, disjoint [start, stop) within 0 ... {length}")
        positions = positions_in_runs(runs)
        taken = positions[holder[positions] >= 0]
        if taken.size:
            raise ValueError(f"{where}: position {taken[0]} belongs to rank {holder[taken[0]]} too")
        holder[positions] = rank
        at = np.unique(np.clip(np.concatenate([ends, ends + 1, [0, length]]), 0, length))
        wrong = np.flatnonzero(layout.count(at, rank, world, length, cu_seqlens) != count_in_runs(at, runs))
        if wrong.size:
            raise ValueError(f"{where}: count() up to position {at[wrong[0]]} disagrees with runs()")
    if (holder < 0).any():
        raise ValueError(f"layout {layout.name!r}: position {np.argmin(holder)} of {length} belongs to no rank")
    if (layout.owners(np.arange(length, dtype=np.int64), world, length, cu_seqlens) != holder).any():
        raise ValueError(f"layout {layout.name!r}: owners() disagrees with runs() for length {length}, world {world}")


def _cut(index: int, parts: int, length: int) -> int:
    return index * length // parts


def _chunk_of(positions: np.ndarray, chunks: int, length: int) -> np.ndarray:
    """Which of `chunks` balanced chunks each position lies in: the last one whose first cut is not behind it."""
    return ((positions + 1) * chunks - 1) // length if length else np.zeros_like(positions)


def _count_chunk(positions: np.ndarray, chunk: int, chunks: int, length: int) -> np.ndarray:
    """Tokens of one of `chunks` balanced chunks before each position."""
    start, stop = _cut(chunk, chunks, length), _cut(chunk + 1, chunks, length)
    return np.clip(positions, start, stop) - start
