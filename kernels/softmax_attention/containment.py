"""NaN and inf stay with the queries that see them.

A kernel that masks multiplies what it masked by 0, and 0 * NaN is NaN: one bad key would reach queries of other
documents. So a kernel never gets such a number: the offending vectors are zeroed before it runs, and afterwards NaN
is written to exactly the queries that see an offender (forward), and to their gradients and those of the keys that
they see (backward). `intervals` tell who sees whom, so this costs a few running sums, and on a CPU only where
something is not finite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals


def all_finite(*tensors: Tensor | None) -> bool:
    """Whether it is known that all numbers are finite; on an accelerator it never is: asking would wait for it."""
    given = [x for x in tensors if x is not None]
    # A sum is finite only where all its terms are; one that overflows costs time and nothing else.
    return all(x.device.type == "cpu" and bool(x.sum().isfinite()) for x in given)


def contain(
    intervals: KeyIntervals, *, queries: Sequence[Tensor], keys: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Zero every offender among the queries' tensors [B, T, H(, K)] and the keys' [B, S, G, K]; tell who sees one.

    A query is bad where any of its numbers, or of those of a key that it sees, is not finite. One that sees
    no key here is never bad: nothing is computed for it.
    Returns the queries' tensors, the keys' tensors and bad, bool [B, T, H].
    """
    lo, hi = (torch.from_numpy(ends).to(queries[0].device) for ends in (intervals.lo, intervals.hi))
    bad_queries, bad_keys = offending(queries), offending(keys)
    bad = bad_queries & (lo < hi)[None, :, None]
    bad |= any_between(bad_keys, lo, hi).repeat_interleave(bad.shape[2] // bad_keys.shape[2], dim=2)
    return _zeroed(queries, bad_queries), _zeroed(keys, bad_keys), bad


def keys_seen_by(bad: Tensor, intervals: KeyIntervals, groups: int) -> Tensor:
    """The keys that a bad query sees: bad [B, T, H] -> bool [B, S, G]."""
    first, stop = (torch.from_numpy(ends).to(bad.device) for ends in intervals.queries())
    return any_between(bad.unflatten(2, (groups, bad.shape[2] // groups)).any(3), first, stop)


def offending(tensors: Sequence[Tensor]) -> Tensor:
    """Several [B, T, H, K] or [B, T, H] -> bool [B, T, H]: where any of them holds a number that is not finite."""
    finite = torch.stack([x.isfinite().all(-1) if x.ndim > 3 else x.isfinite() for x in tensors])
    return ~finite.all(0)


def _zeroed(tensors: Sequence[Tensor], where: Tensor) -> list[Tensor]:
    return [x.masked_fill(where[..., None] if x.ndim > 3 else where, 0) for x in tensors]


def any_between(marks: Tensor, first: Tensor, stop: Tensor) -> Tensor:
    """Whether any of marks[:, first[i]:stop[i]] is set: marks [B, S, G], first and stop [T] -> bool [B, T, G]."""
    before = torch.nn.functional.pad(marks.cumsum(1), (0, 0, 1, 0))  # [B, S + 1, G]: marks before each position
    return before.index_select(1, stop) > before.index_select(1, first)
