"""Softmax attention by chunks of queries and of keys, computed again in backward: plain PyTorch, memory linear in T.

Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory": for one chunk of queries the keys come chunk by chunk,
and of each only three summaries stay, the largest score m, the sum of exp(score - m) and the values weighted by these
(section 3, equations 4 and 5 with the safe softmax of section 3.1). Nothing of T x S is kept for backward, which makes
the chunks' scores again from q, k and the final lse (section 4; equations as in `reference.backward`).

Beyond its inputs and results a call holds a few chunks [B, H, 256, 512] in the dtype of the partials, whatever T:
inputs in half precision are widened a chunk at a time. Nothing here asks for more of a device than matrix products.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.softmax_attention.containment import all_finite, any_between, offending

_ROWS, _KEYS = 256, 512  # queries and keys of a chunk, at most


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`attention_forward` (see the package) chunk by chunk."""
    if intervals.area == 0 or out.numel() == 0:
        return
    cut = _Cut(intervals, k, state=out.dtype, queries=[q], keys=[k, v])
    for rows in cut.rows():
        queries = cut.of_queries(q, rows).mul_(scale)
        # The running result is one more chunk's summary: its largest score is lse, its sum of exp(score - lse) is 1.
        largest, acc = (cut.of_queries(x, rows, contained=False) for x in (lse[..., None], out))
        total = (largest != -torch.inf).to(acc.dtype)
        for keys, hidden in cut.keys_of(rows):
            scores = _scores(queries, cut.of_keys(k, keys), softcap)
            if hidden is not None:
                _by_query(scores, hidden).masked_fill_(hidden, -torch.inf)
            before, largest = largest, torch.maximum(largest, scores.amax(-1, keepdim=True))
            top = largest.masked_fill(largest == -torch.inf, 0)  # no key seen: exp(-inf - 0) is 0, exp(-inf - -inf) NaN
            shrink = (before - top).exp_()
            weights = scores.sub_(top).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            acc = torch.baddbmm(acc.mul_(shrink), weights, cut.of_keys(v, keys))
        cut.put(out, rows, acc.div_(total.masked_fill(total == 0, 1)))
        cut.put(lse[..., None], rows, total.log_().add_(largest))
    if cut.bad is not None:
        out.masked_fill_(cut.bad[..., None], torch.nan)
        lse.masked_fill_(cut.bad, torch.nan)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    softcap: float | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """`attention_backward` (see the package) chunk by chunk."""
    if intervals.area == 0 or dq.numel() == 0:
        return
    # The lse of a query that sees nothing anywhere is no offender: 0 stands for it.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    suspects = [q, out, lse, dout] + ([] if dlse is None else [dlse])
    cut = _Cut(intervals, k, state=dq.dtype, queries=suspects, keys=[k, v])
    for rows in cut.rows():
        queries, upstream = cut.of_queries(q, rows).mul_(scale), cut.of_queries(dout, rows)
        ends = cut.of_queries(lse[..., None], rows)
        delta = (upstream * cut.of_queries(out, rows)).sum(-1, keepdim=True)
        if dlse is not None:
            delta -= cut.of_queries(dlse[..., None], rows)
        dqueries = torch.zeros_like(queries)
        for keys, hidden in cut.keys_of(rows):
            key, value = cut.of_keys(k, keys), cut.of_keys(v, keys)
            scores = _scores(queries, key, softcap)
            weights = (scores - ends).exp_()
            dscores = torch.bmm(upstream, value.mT).sub_(delta).mul_(weights)
            if softcap is not None:
                dscores *= scores.div_(softcap).square_().neg_().add_(1)  # the derivative of tanh
            if hidden is not None:
                for x in (weights, dscores):  # both: what is hidden may have overflowed, and 0 * inf is NaN
                    _by_query(x, hidden).masked_fill_(hidden, 0)
            dqueries.baddbmm_(dscores, key, alpha=scale)
            cut.add_to_keys(dk, keys, torch.bmm(dscores.mT, queries))  # the queries hold the scale
            cut.add_to_keys(dv, keys, torch.bmm(weights.mT, upstream))
        cut.put(dq, rows, dqueries, add=True)
    if cut.bad is not None:
        reached = cut.keys_seen_by_bad()[..., None]
        dq.masked_fill_(cut.bad[..., None], torch.nan)
        dk.masked_fill_(reached, torch.nan)
        dv.masked_fill_(reached, torch.nan)


class _Cut:
    """A call's tensors by chunks of queries and keys.

    A chunk of queries is [B * G, H/G * t, ...], the query heads of a key head one below the other, and one of keys
    [B * G, s, ...]: so a product with the key head that they share is one matrix product. They have the state dtype.
    Vectors that are not finite come as zeros, as `containment` has it; `bad` tells which queries see one, bool
    [B, T, H], or is None where there are none.
    """

    def __init__(
        self,
        intervals: KeyIntervals,
        k: Tensor,
        *,
        state: torch.dtype,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
    ) -> None:
        self._intervals, self._state = intervals, state
        self._batch, self._groups, device = k.shape[0], k.shape[2], k.device
        self._lo, self._hi = (torch.from_numpy(ends).to(device) for ends in (intervals.lo, intervals.hi))
        self._bad_queries = self._bad_keys = self.bad = None
        if all_finite(*queries, *keys):
            return
        self._bad_queries, self._bad_keys = _offending(queries), _offending(keys)
        self.bad = self._bad_queries & (self._lo < self._hi)[None, :, None]
        share = queries[0].shape[2] // self._groups
        self.bad |= any_between(self._bad_keys, self._lo, self._hi).repeat_interleave(share, dim=2)

    def rows(self) -> Iterator[slice]:
        """Chunks of queries that see any key."""
        lo, hi = self._intervals.lo, self._intervals.hi
        for rows in _slices(lo.size, _ROWS):
            if (lo[rows] < hi[rows]).any():
                yield rows

    def keys_of(self, rows: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The chunks of keys that a chunk of queries sees, and which pairs are hidden, bool [t, s]; None: no pair."""
        lo, hi = self._intervals.lo[rows], self._intervals.hi[rows]
        seeing = lo < hi
        all_see, lo, hi = bool(seeing.all()), lo[seeing], hi[seeing]
        start = 0
        while start < hi[-1]:
            start = max(start, int(lo[np.searchsorted(hi, start, side="right")]))  # past keys that nobody sees
            last = np.searchsorted(lo, start + _KEYS) - 1  # the last query that sees one of the chunk
            stop = min(start + _KEYS, int(hi[last]))
            keys = slice(start, stop)
            full = all_see and lo[-1] <= start and hi[0] >= stop
            yield keys, None if full else self._hidden(rows, keys)
            start = stop

    def of_queries(self, x: Tensor, rows: slice, *, contained: bool = True) -> Tensor:
        """A copy of a chunk of x [B, T, H, K]: [B * G, H/G * t, K]. contained: vectors that are not finite as zeros."""
        part = x[:, rows].unflatten(2, (self._groups, -1)).permute(0, 2, 3, 1, 4)
        part = part.to(self._state, copy=True, memory_format=torch.contiguous_format)
        if contained and self._bad_queries is not None:
            bad = self._bad_queries[:, rows].unflatten(2, (self._groups, -1)).permute(0, 2, 3, 1)
            part.masked_fill_(bad[..., None], 0)
        return part.flatten(0, 1).flatten(1, 2)

    def of_keys(self, x: Tensor, keys: slice) -> Tensor:
        """A copy of a chunk of x [B, S, G, K]: [B * G, s, K]."""
        part = x[:, keys].transpose(1, 2).to(self._state, copy=True, memory_format=torch.contiguous_format)
        if self._bad_keys is not None:
            part.masked_fill_(self._bad_keys[:, keys].transpose(1, 2)[..., None], 0)
        return part.flatten(0, 1)

    def put(self, x: Tensor, rows: slice, part: Tensor, *, add: bool = False) -> None:
        """Write a chunk of queries into x [B, T, H, V], or add it."""
        target = x[:, rows].unflatten(2, (self._groups, -1)).permute(0, 2, 3, 1, 4)  # a view [B, G, H/G, t, V]
        part = part.view(target.shape)
        target.add_(part) if add else target.copy_(part)

    def add_to_keys(self, x: Tensor, keys: slice, part: Tensor) -> None:
        """Add a chunk of keys to x [B, S, G, K]."""
        x[:, keys].transpose(1, 2).add_(part.unflatten(0, (self._batch, self._groups)))

    def keys_seen_by_bad(self) -> Tensor:
        """bool [B, S, G]."""
        assert self.bad is not None
        first, stop = (torch.from_numpy(ends).to(self.bad.device) for ends in self._intervals.queries())
        return any_between(self.bad.unflatten(2, (self._groups, -1)).any(3), first, stop)

    def _hidden(self, rows: slice, keys: slice) -> Tensor:
        key = torch.arange(keys.start, keys.stop, device=self._lo.device)
        return (key < self._lo[rows, None]) | (key >= self._hi[rows, None])


def _slices(size: int, most: int) -> Iterator[slice]:
    return (slice(start, min(start + most, size)) for start in range(0, size, most))


def _scores(queries: Tensor, keys: Tensor, softcap: float | None) -> Tensor:
    """[B * G, n, K] and [B * G, s, K] -> [B * G, n, s]."""
    scores = torch.bmm(queries, keys.mT)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _by_query(scores: Tensor, hidden: Tensor) -> Tensor:
    """Scores [B * G, H/G * t, s] as a view [B * G, H/G, t, s], as `hidden` [t, s] is laid out."""
    return scores.unflatten(1, (-1, hidden.shape[0]))


def _offending(tensors: Sequence[Tensor]) -> Tensor:
    """`containment.offending`, whose temporaries are as large as what it is asked about, chunk by chunk."""
    return torch.cat([offending([x[:, part] for x in tensors]) for part in _slices(tensors[0].shape[1], _KEYS)], 1)
