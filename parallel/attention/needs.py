"""Which part of whose keys each rank sees: what has to travel, worked out on every rank alike, without a message.

The queries of a rank fall into pieces, its runs of consecutive tokens cut at document boundaries, and the keys that one
piece sees are an interval of positions. How many of them a holder has is the layout's to count. So what a pair of ranks
has to send costs a few numbers per piece, not one per token.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from longtrain.kernels.intervals import visible_keys
from longtrain.parallel.shard import SequenceShard


class Part(NamedTuple):
    """The keys start ... stop-1 of those that a rank holds."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def within(self, whole: "Part") -> "Part":
        """The same keys counted from the start of `whole`, a part that holds them."""
        return Part(self.start - whole.start, self.stop - whole.start) if self.size else NOTHING


NOTHING = Part(0, 0)


class Needs:
    """The parts of the holders' keys that readers see, for one mask; `keys` may be `queries` themselves."""

    def __init__(
        self, queries: SequenceShard, keys: SequenceShard, *, causal: bool, window: tuple[int | None, int | None] | None
    ) -> None:
        self._queries, self._keys, self._causal, self._window = queries, keys, causal, window
        left, right = window if window is not None else (None, None)
        right = 0 if causal else right
        self._reach = math.inf if left is None or right is None else left + right + 1
        self._pieces: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def part(self, reader: int, holder: int) -> Part:
        """From the first to the last of the holder's keys that the reader sees; NOTHING where it sees none."""
        keys = self._keys
        first, stop = self._visible(reader)
        if not first.size:
            return NOTHING
        ends = np.concatenate([first, stop])
        lo, hi = np.split(keys.layout.count(ends, holder, keys.world, keys.length, keys.cu_seqlens), 2)
        seen = np.flatnonzero(lo < hi)
        return Part(int(lo[seen[0]]), int(hi[seen[-1]])) if seen.size else NOTHING

    def hull(self, readers: Iterable[int], holder: int) -> Part:
        """From the first to the last of the holder's keys that any of the readers sees."""
        parts = [part for reader in readers if (part := self.part(reader, holder)).size]
        return Part(min(part.start for part in parts), max(part.stop for part in parts)) if parts else NOTHING

    def _visible(self, reader: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions [first, stop) that the reader's pieces see, int64 [pieces], without those that see none."""
        if reader not in self._pieces:
            shard = self._queries
            starts, stops = _pieces(shard, reader, self._reach)
            # The keys that a piece sees begin with its first query's and end with its last query's.
            first, stop = visible_keys(
                np.stack([starts, stops - 1], axis=1).reshape(-1),
                causal=self._causal,
                window=self._window,
                query_offsets=shard.cu_seqlens,
                key_offsets=self._keys.cu_seqlens,
            )
            first, stop = first[::2], stop[1::2]
            seeing = first < stop
            self._pieces[reader] = first[seeing], stop[seeing]
        return self._pieces[reader]


def _pieces(shard: SequenceShard, rank: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """A rank's runs cut at document boundaries: positions [start, stop), int64 [pieces] each, increasing.

    reach: pieces of a document are one where a query sees up to so many positions from the first to the last, and the
    next piece begins closer than that: what they see is one interval too.
    """
    runs = shard.layout.runs(rank, shard.world, shard.length, shard.cu_seqlens)
    starts, stops = runs[runs[:, 0] < runs[:, 1]].T
    if not starts.size:
        return starts, stops
    boundaries = shard.cu_seqlens
    run = np.searchsorted(starts, boundaries, side="right") - 1
    inside = np.unique(boundaries[(run >= 0) & (boundaries > starts[run]) & (boundaries < stops[run])])
    if inside.size:
        starts, stops = np.sort(np.concatenate([starts, inside])), np.sort(np.concatenate([stops, inside]))
    apart = np.append(True, starts[1:] - stops[:-1] >= reach)
    begins = np.searchsorted(starts, boundaries)  # the first piece of each document
    apart[begins[begins < starts.size]] = True
    return starts[apart], stops[np.append(apart[1:], True)]
