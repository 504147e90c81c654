"""What a kernel is told of a mask: two numbers where it is a plain diagonal, otherwise vectors on the device."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals


@dataclass(frozen=True)
class Ends:
    """The interval [first, stop) of `others` seen by each row: queries their keys, or keys their queries.

    first, stop: int32 vectors on the device; or None, and row i sees i + first_shift ... i + stop_shift - 1, clipped
    to 0 ... others (a full, a causal or a window mask over one document).
    """

    first: Tensor | None
    stop: Tensor | None
    first_shift: int
    stop_shift: int


@dataclass(frozen=True)
class _Shifts:
    lo: int
    hi: int


# As `KeyIntervals.tiles`: made once, so that all layers of a model share them; gone with the intervals.
_shifts: "WeakKeyDictionary[KeyIntervals, _Shifts | None]" = WeakKeyDictionary()
_vectors: "WeakKeyDictionary[KeyIntervals, dict[torch.device, tuple[Ends, Ends]]]" = WeakKeyDictionary()


def ends(intervals: KeyIntervals, device: torch.device) -> tuple[Ends, Ends]:
    """What queries see of the keys, and what keys see of the queries."""
    if intervals not in _shifts:
        _shifts[intervals] = _find_shifts(intervals)
    shifts = _shifts[intervals]
    if shifts is not None:
        # Query i sees key j where i + lo <= j < i + hi: queries j - hi + 1 ... j - lo.
        return Ends(None, None, shifts.lo, shifts.hi), Ends(None, None, 1 - shifts.hi, 1 - shifts.lo)
    known = _vectors.setdefault(intervals, {})
    if device not in known:
        arrays = [intervals.lo, intervals.hi, *intervals.queries()]
        joined = torch.from_numpy(np.concatenate(arrays).astype(np.int32)).to(device)
        lo, hi, first, stop = joined.split([x.size for x in arrays])
        known[device] = Ends(lo, hi, 0, 0), Ends(first, stop, 0, 0)
    return known[device]


def plain_mask(intervals: KeyIntervals) -> str | None:
    """ "full" or "causal" where every query sees all keys, or, with as many keys as queries, those up to its own."""
    size = intervals.lo.size
    if size == 0 or intervals.keys == 0 or intervals.lo[-1] != 0:
        return None
    if intervals.hi[0] == intervals.keys:
        return "full"
    if intervals.keys == size and intervals.hi[0] == 1 and intervals.area == size * (size + 1) // 2:
        return "causal" if bool((intervals.hi == np.arange(1, size + 1)).all()) else None
    return None


def _find_shifts(intervals: KeyIntervals) -> _Shifts | None:
    lo, hi = (_shift(x, intervals.keys) for x in (intervals.lo, intervals.hi))
    return None if lo is None or hi is None else _Shifts(lo, hi)


def _shift(x: np.ndarray, most: int) -> int | None:
    """The number s with x[i] = min(max(i + s, 0), most) for all i, if there is one."""
    zeros = int(np.searchsorted(x, 0, side="right"))  # x never decreases
    shift = int(x[zeros]) - zeros if zeros < x.size else -x.size
    return shift if np.array_equal(x, np.clip(np.arange(x.size) + shift, 0, most)) else None
