"""Documents cut into chunks of equal length, over ranks: who holds which chunk, and tensors laid out chunk by chunk.

A chunk starts at a multiple of its length inside its document; a document's last chunk may be short. Layers that work
chunk by chunk run where every rank holds whole chunks: tokens are moved there and back, by one all-to-all each (none
where they lie so already). There a sequence of chunks is a sequence like any other, with a shard of its own.

Letters: L tokens of a whole chunk, N_w chunks of this rank, T_w tokens of this rank, both where it holds whole chunks.
"""

import numpy as np
import torch
from torch import Tensor

from longtrain.parallel import SequenceShard, sequence_parallel_conv1d
from longtrain.parallel.layouts import Cuts
from longtrain.parallel.moves import HostIndex


class Chunks:
    """The chunks of a sharded sequence; made once for a shard and a length by `chunks_of`.

    home: where every rank holds whole chunks, a shard of the same tokens. chunks: the sequence of chunks, with the
    same documents. finished: the sequence of those chunks that their document goes on after.

    Host data, int64 [N_w]: numbers, of each local chunk in its document; first_finished, where in the sequence of
    finished chunks its document's first one lies. local_finished: which local chunks are finished.
    """

    def __init__(self, shard: SequenceShard, length: int) -> None:
        offsets, world = shard.cu_seqlens, shard.world
        counts = -(-np.diff(offsets) // length)
        self.length = length
        self._first = _starts(counts)  # number of the first chunk of each document
        self._first_finished = _starts(np.maximum(counts - 1, 0))
        cuts = [self._cut(offsets, rank * shard.length // world, shard.length) for rank in range(world)]
        tokens, chunks, finished = zip(*cuts, self._cut(offsets, shard.length, shard.length), strict=True)
        self.home = _cut_at(shard, tokens)
        self.chunks = shard.beside(chunks[-1], layout=Cuts(chunks), cu_seqlens=self._first)
        self.finished = shard.beside(finished[-1], layout=Cuts(finished), cu_seqlens=self._first_finished)
        self._index(shard.rank, tokens, chunks)

    def _cut(self, offsets: np.ndarray, position: int, end: int) -> tuple[int, int, int]:
        """The chunk that holds a position: where it starts, how many chunks and finished chunks are before it."""
        if position == end:
            return end, int(self._first[-1]), int(self._first_finished[-1])
        document = int(np.searchsorted(offsets, position, side="right")) - 1
        number = (position - int(offsets[document])) // self.length
        start = int(offsets[document]) + number * self.length
        return start, int(self._first[document]) + number, int(self._first_finished[document]) + number

    def _index(self, rank: int, tokens: tuple[int, ...], chunks: tuple[int, ...]) -> None:
        """Where each local token lies in the grid of local chunks, and the other way round."""
        first, last = chunks[rank], chunks[rank + 1]
        numbers = np.arange(first, last, dtype=np.int64)
        document = np.searchsorted(self._first, numbers, side="right") - 1
        inside = numbers - self._first[document]  # number of the chunk in its document
        starts = self.home.cu_seqlens[document] + inside * self.length
        stops = np.minimum(starts + self.length, self.home.cu_seqlens[document + 1])
        cells = starts[:, None] + np.arange(self.length) - tokens[rank]
        empty = cells >= (stops - tokens[rank])[:, None]
        self.numbers = HostIndex(inside)
        self.first_finished = HostIndex(self._first_finished[document])
        self.cells = HostIndex(np.where(empty, self.home.local_length, cells).reshape(-1))
        self.places = HostIndex(np.flatnonzero(~empty.reshape(-1)))
        self.local_finished = HostIndex(np.flatnonzero(numbers + 1 < self._first[document + 1]))

    def grid(self, x: Tensor) -> Tensor:
        """``[B, T_w, ...]`` -> ``[B, N_w, L, ...]``, zeros where a chunk is short."""
        padded = torch.cat((x, x.new_zeros(x.shape[0], 1, *x.shape[2:])), 1)
        return padded.index_select(1, self.cells.on(x.device)).unflatten(1, (-1, self.length))

    def tokens(self, x: Tensor) -> Tensor:
        """``[B, N_w, L, ...]`` -> ``[B, T_w, ...]``, what `grid` came from."""
        return x.flatten(1, 2).index_select(1, self.places.on(x.device))

    def before(self, x: Tensor) -> Tensor:
        """``[B, N_w, ...]`` -> alike: what x has for the chunk before each, zeros ahead of a document's first.

        Over ranks one chunk travels, as the halo of a convolution along the chunks whose taps are 1 and 0. What is not
        finite travels as the largest number, which times 0 is nothing to the chunk itself, and comes out as NaN.
        """
        flat, largest = x.flatten(2), torch.finfo(x.dtype).max
        taps = flat.new_tensor([1.0, 0.0]).expand(flat.shape[2], 2).contiguous()
        flat = torch.where(flat.isfinite(), flat, largest)
        moved = sequence_parallel_conv1d(flat, taps, None, self.chunks)
        return torch.where(moved == largest, torch.nan, moved).view_as(x)


def sums_over_earlier(matrices: Tensor, x: Tensor) -> Tensor:
    """``sum_{s <= t} matrices[c, t, s] x[.., s, c]`` for the tokens of each chunk, ``[B, N, L, C]``.

    matrices: ``[C, L, L]``, 0 above their diagonals. x: ``[B, N, L, C]``. What is not finite makes NaN of the sums that
    it belongs to, and of no others.
    """
    sums, counts = _finite_sums(matrices, x)
    return torch.where(counts > 0, torch.nan, sums)


def sums_over_later(matrices: Tensor, x: Tensor) -> Tensor:
    """As `sums_over_earlier`, over ``s > t``: matrices are 0 below their diagonals and on them."""
    sums, counts = _finite_sums(matrices, x)
    return torch.where(counts < counts[:, :, -1:], torch.nan, sums)


def _finite_sums(matrices: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums over what is finite, and how many numbers up to each token are not, ``[B, N, L, C]``."""
    finite = x.isfinite()
    sums = torch.einsum("cts,bnsc->bntc", matrices, torch.where(finite, x, 0))
    return sums, (~finite).cumsum(2, dtype=torch.int32)


def chunks_of(shard: SequenceShard, length: int) -> Chunks:
    """The chunks of a shard's documents; kept on the shard, so that every layer shares them."""
    kept = shard.plans.setdefault(shard, {})
    key = ("chunks", length)
    if key not in kept:
        kept[key] = Chunks(shard, length)
    return kept[key]


def _starts(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _cut_at(shard: SequenceShard, bounds: tuple[int, ...]) -> SequenceShard:
    """The shard's tokens cut at bounds; the shard itself where they lie so."""
    held = (shard.layout.runs(rank, shard.world, shard.length, shard.cu_seqlens) for rank in range(shard.world))
    if all(runs.tolist() == [list(bounds[rank : rank + 2])] for rank, runs in enumerate(held)):
        return shard
    return shard.with_layout(Cuts(bounds))
