"""Which keys each query sees: one interval of key indices per query.

Queries and keys are held in increasing position. Then a causal mask, a window, packed documents and any mix of
them leave every query one interval [lo, hi) of key indices, whose ends never decrease along the queries. So the
queries that see one key are an interval too, and an attention kernel needs to know nothing else about masks.

Everything here is host data (numpy, int64): it steers loops and launches, and is made once per batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

# Below these sizes a call costs more than the arithmetic that it saves (measured on one CPU core, H = 4, K = 64).
_SHORTEST_RUN = 32  # queries in a run that gets tiles of its own
_LONGEST_DIAGONAL = 256  # queries in a diagonal tile: kernels compute the invisible half of one this small too
_BLOCK = 128  # queries in a masked tile, at most
_LARGE_INTERIOR = 1 << 16  # pairs of a block's queries and the keys that all of them see: worth an unmasked tile
_CHEAP_WASTE = 4096  # invisible pairs in a masked tile that cost no more than a second call


@dataclass(frozen=True)
class Tile:
    """A rectangle of queries x keys that a kernel computes at once; every visible pair lies in exactly one.

    kind: "full": every query sees every key; "diagonal": as many keys as queries, query i sees keys 0 ... i of the
    tile; "masked": `KeyIntervals.visible` tells, and some queries may see no key of the tile.
    """

    rows: slice
    keys: slice
    kind: Literal["full", "diagonal", "masked"]

    def cut(self, rows: int, keys: int) -> "Iterator[Tile]":
        """The same pairs in tiles of at most `rows` queries and `keys` keys (`rows` <= `keys`)."""
        for a in range(self.rows.start, self.rows.stop, rows):
            b = min(a + rows, self.rows.stop)
            stop, own = self.keys.stop, None
            if self.kind == "diagonal":
                stop = self.keys.start + a - self.rows.start
                own = Tile(slice(a, b), slice(stop, stop + b - a), "diagonal")
            for c in range(self.keys.start, stop, keys):
                yield Tile(slice(a, b), slice(c, min(c + keys, stop)), "full" if own else self.kind)
            if own:
                yield own


@dataclass(frozen=True, eq=False)
class KeyIntervals:
    """For each query i the local keys lo[i] ... hi[i]-1 that it sees, among `keys` of them.

    `lo` and `hi` are int64 [T], never decrease, and 0 <= lo <= hi <= keys; anything else is a ValueError.
    The arrays are not copied and must not be written to afterwards. The same intervals serve every batch row and head.
    """

    lo: np.ndarray
    hi: np.ndarray
    keys: int

    def __post_init__(self) -> None:
        lo, hi = self.lo, self.hi
        for name, ends in (("lo", lo), ("hi", hi)):
            if not isinstance(ends, np.ndarray) or ends.dtype != np.int64 or ends.ndim != 1:
                raise ValueError(f"{name}: got {ends!r}, expected a one-dimensional numpy array of int64")
        if lo.shape != hi.shape:
            raise ValueError(f"hi: got {hi.size} queries, expected as many as in lo, {lo.size}")
        if lo.size == 0:
            return
        if lo[0] < 0 or hi[-1] > self.keys or (lo > hi).any():
            raise ValueError(f"lo, hi: expected 0 <= lo <= hi <= {self.keys} for every query")
        if (lo[1:] < lo[:-1]).any() or (hi[1:] < hi[:-1]).any():
            raise ValueError("lo, hi: expected ends that never decrease along the queries")

    @cached_property
    def area(self) -> int:
        """Visible (query, key) pairs, the exact work: sum(hi - lo)."""
        return int((self.hi - self.lo).sum())

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The visible pairs as few, large tiles: kept, so that all layers of a model share the search for them."""
        return tuple(_tiles(self.lo, self.hi))

    def visible(self, tile: Tile) -> np.ndarray:
        """Which of the tile's pairs are visible: bool [queries, keys]."""
        key = np.arange(tile.keys.start, tile.keys.stop)
        return (self.lo[tile.rows, None] <= key) & (key < self.hi[tile.rows, None])

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """For each key j the queries first[j] ... stop[j]-1 that see it: two int64 arrays [S], first <= stop."""
        # Query i sees j when lo[i] <= j < hi[i]. Both ends are sorted: hi[i] > j holds from some query on, and
        # lo[i] <= j up to some query; as many have lo[i] <= j as have hi[i] <= j, or more.
        key = np.arange(self.keys, dtype=np.int64)
        first = np.searchsorted(self.hi, key, side="right").astype(np.int64)
        stop = np.searchsorted(self.lo, key, side="right").astype(np.int64)
        return first, stop


def visible_keys(
    positions: np.ndarray,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    query_offsets: np.ndarray,
    key_offsets: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The global key positions [first, stop) that the query at each position may see, clipped to its document.

    positions: int64 [T], increasing, the queries' positions in the whole sequence.
    query_offsets, key_offsets: int64 [N+1], where the N documents begin among queries and among keys; document n of
    the queries sees document n of the keys. Where their lengths differ, the last query stands on the last key
    (bottom-right alignment), for causal masks and for windows.
    window: (left, right): a query standing on key c sees c-left ... c+right; None inside the pair is unlimited;
    `causal` makes right 0.
    Returns two int64 arrays [T], first <= stop, neither ever decreasing.
    """
    document = np.searchsorted(query_offsets, positions, side="right") - 1
    key_start, key_stop = key_offsets[document], key_offsets[document + 1]
    # The key on which the query stands; before key_start for the first queries of a document with fewer keys.
    own = positions - query_offsets[document + 1] + key_stop
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0
    # Farther than this is everything; larger numbers would overflow.
    farthest = int(query_offsets[-1] + key_offsets[-1])
    left, right = (side if side is None else min(side, farthest) for side in (left, right))
    first = key_start if left is None else np.clip(own - left, key_start, key_stop)
    stop = key_stop if right is None else np.clip(own + right + 1, first, key_stop)
    return first.astype(np.int64), stop.astype(np.int64)


def _tiles(lo: np.ndarray, hi: np.ndarray) -> Iterator[Tile]:
    """Runs of queries with the same keys become full tiles, runs that see one key more each diagonals."""
    area = np.concatenate(([0], np.cumsum(hi - lo)))
    done = 0
    for first, stop, growing in _runs(lo, hi):
        yield from _blocks(lo, hi, area, done, first)
        done = stop
        if growing and lo[first] == hi[first]:
            first += 1  # sees nothing yet
        rows, start, end = slice(first, stop), int(lo[first]), int(hi[first])
        if not growing:
            if start < end:
                yield Tile(rows, slice(start, end), "full")
            continue
        if start < end - 1:
            yield Tile(rows, slice(start, end - 1), "full")
        yield from _diagonals(first, end - 1, stop - first)
    yield from _blocks(lo, hi, area, done, lo.size)


def _diagonals(row: int, key: int, size: int) -> Iterator[Tile]:
    """A diagonal of `size` queries as small diagonals with full tiles below them."""
    if size <= _LONGEST_DIAGONAL:
        yield Tile(slice(row, row + size), slice(key, key + size), "diagonal")
        return
    half = -(-size // 128) * 64  # whole rows of blocks inside a kernel
    yield from _diagonals(row, key, half)
    yield Tile(slice(row + half, row + size), slice(key, key + half), "full")
    yield from _diagonals(row + half, key + half, size - half)


def _runs(lo: np.ndarray, hi: np.ndarray) -> Iterator[tuple[int, int, bool]]:
    """Long runs of queries with one lo and with hi constant (False) or growing by 1 (True): (first, stop, growing)."""
    if lo.size < _SHORTEST_RUN:
        return
    growth = np.where(lo[1:] == lo[:-1], np.minimum(hi[1:] - hi[:-1], 2), 2)  # between neighbours; 2: not a run
    starts = np.concatenate(([0], np.flatnonzero(growth[1:] != growth[:-1]) + 1))
    stops = np.concatenate((starts[1:], [growth.size]))
    done = 0
    for index in np.flatnonzero((growth[starts] < 2) & (stops - starts >= _SHORTEST_RUN)):
        # Neighbouring runs share a query: it stays with the earlier one.
        first, stop = max(done, int(starts[index])), int(stops[index]) + 1
        yield first, stop, bool(growth[starts[index]])
        done = stop


def _blocks(lo: np.ndarray, hi: np.ndarray, area: np.ndarray, first: int, stop: int) -> Iterator[Tile]:
    """Ragged queries first ... stop-1 in blocks, each with the keys any of them sees; `area`: pairs before each."""
    for start in range(first, stop, _BLOCK):
        blocks = [(start, min(start + _BLOCK, stop))]
        while blocks:
            a, b = blocks.pop()
            seeing = np.flatnonzero(hi[a:b] > lo[a:b])
            if seeing.size == 0:
                continue
            a, b = a + int(seeing[0]), a + int(seeing[-1]) + 1
            pairs = int(area[b] - area[a])
            waste = (b - a) * int(hi[b - 1] - lo[a]) - pairs
            if waste > max(pairs, _CHEAP_WASTE):
                middle = (a + b) // 2
                blocks += [(middle, b), (a, middle)]
                continue
            # Keys from `inner` up to `outer` are seen by all queries of the block.
            begin, inner, outer, end = int(lo[a]), int(lo[b - 1]), int(hi[a]), int(hi[b - 1])
            rows = slice(a, b)
            if waste == 0:
                yield Tile(rows, slice(begin, end), "full")
            elif (b - a) * (outer - inner) < _LARGE_INTERIOR:
                yield Tile(rows, slice(begin, end), "masked")
            else:
                if begin < inner:
                    yield Tile(rows, slice(begin, inner), "masked")
                yield Tile(rows, slice(inner, outer), "full")
                if outer < end:
                    yield Tile(rows, slice(outer, end), "masked")
