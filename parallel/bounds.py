"""From the positions that queries may see to intervals of the keys that a rank holds: counting, not searching."""

from typing import TYPE_CHECKING

import numpy as np

from longtrain.kernels.intervals import KeyIntervals

if TYPE_CHECKING:
    from longtrain.parallel.shard import SequenceShard


class Bounds:
    """The global key positions [first, stop) that each query of a shard sees, and what they are on each rank.

    Inside a document many queries share a bound (its start, say): such bounds are counted once and repeated.
    """

    def __init__(self, first: np.ndarray, stop: np.ndarray) -> None:
        (first_values, self._first_repeats), (stop_values, self._stop_repeats) = _distinct(first), _distinct(stop)
        self._values = np.concatenate([first_values, stop_values])
        self._firsts = first_values.size
        self._intervals: dict[int, KeyIntervals] = {}

    def intervals(self, keys: "SequenceShard", source: int) -> KeyIntervals:
        if source not in self._intervals:
            counts = keys.layout.count(self._values, source, keys.world, keys.length, keys.cu_seqlens)
            lo, hi = counts[: self._firsts], counts[self._firsts :]
            lo = lo if self._first_repeats is None else np.repeat(lo, self._first_repeats)
            hi = hi if self._stop_repeats is None else np.repeat(hi, self._stop_repeats)
            self._intervals[source] = KeyIntervals(lo=lo, hi=hi, keys=keys.lengths[source])
        return self._intervals[source]


def _distinct(ends: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Sorted `ends` as (distinct values, how often each occurs); (ends, None) where that would save little."""
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ends)) + 1])
    if 2 * starts.size > ends.size:
        return ends, None
    return ends[starts], np.diff(np.append(starts, ends.size))
