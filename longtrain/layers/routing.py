"""Keys that a layer picks chunk by chunk and head by head, as the data say: who holds them, and who sees them.

Each copy of a sequence, one for every row and head, has picked chunks of its own. So the copies are laid end to end as
documents, and each rank's picked keys, copy after copy, are a key set like any other: a query sees an interval of them,
those of earlier chunks of its document. Only they travel.

What the ranks have to know of each other is one byte for each chunk and copy (`SequenceShard.gather`).
"""

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longtrain.layers.chunks import Chunks, chunks_of
from longtrain.parallel import SequenceShard
from longtrain.parallel.layouts import Cuts, Marked, Repeated
from longtrain.parallel.moves import HostIndex


class RoutedChunks:
    """Queries and picked keys of a sequence in chunks; made once for a shard, a length and a number of copies.

    A chunk's keys are seen by later chunks of its document, so a document's last chunk is never picked.

    queries: a shard of `copies` times the tokens that ``chunks.home`` has here, copy after copy. chunks: how the
    sequence is cut. twice: a shard of its chunks' cells, those of short chunks too, each chunk twice in a row, so that
    a recurrence can read a state before it is written to.
    """

    def __init__(self, chunks: Chunks, copies: int) -> None:
        home, finished = chunks.home, chunks.finished.layout
        assert isinstance(finished, Cuts)
        self.chunks, self.copies, self._bounds = chunks, copies, finished.bounds
        assert isinstance(chunks.chunks.layout, Cuts)
        cells = 2 * chunks.length
        self.twice = chunks.home.beside(
            cells * chunks.chunks.length,
            layout=Cuts(tuple(cells * bound for bound in chunks.chunks.layout.bounds)),
            cu_seqlens=cells * chunks.chunks.cu_seqlens,
        )
        held = [home.layout.runs(rank, home.world, home.length, home.cu_seqlens) for rank in range(home.world)]
        bounds = (0, *(int(runs[-1, 1]) for runs in held))
        starts = np.arange(copies, dtype=np.int64) * home.length
        offsets = np.append((starts[:, None] + home.cu_seqlens[:-1]).reshape(-1), copies * home.length)
        self.queries = home.beside(copies * home.length, layout=Repeated(bounds, copies), cu_seqlens=offsets)
        # Where the chunk after each finished one begins: from there on its keys are seen.
        counts = np.diff(chunks.finished.cu_seqlens)
        number = np.arange(finished.bounds[-1]) - np.repeat(chunks.finished.cu_seqlens[:-1], counts)
        self._ends = np.repeat(home.cu_seqlens[:-1], counts) + (number + 1) * chunks.length

    @property
    def _own(self) -> slice:
        """This rank's among all finished chunks."""
        return slice(*self._bounds[self.chunks.home.rank : self.chunks.home.rank + 2])

    def agreed(self, chosen: Tensor) -> np.ndarray:
        """The choices of all ranks on the host, bool ``[finished chunks of all, copies]``. All ranks call it; the host
        waits for the device.

        chosen: bool ``[B, n, H]``, of this rank's n finished chunks, B H the number of copies.
        """
        own = chosen.movedim(1, 0).flatten(1).to(torch.uint8)
        every = self.chunks.finished.gather(own, dim=0)
        if isinstance(every, FakeTensor):  # a dry run makes no choices: every other chunk, as good as any
            return np.indices(tuple(every.shape)).sum(0) % 2 == 0
        return every.cpu().numpy().astype(bool)

    def keys(self, picked: np.ndarray) -> SequenceShard:
        """The key set of what is picked, bool ``[finished chunks of all ranks, copies]``, the same on all ranks.

        Each rank holds the tokens of its picked chunks, first those of the first copy.
        """
        length, marks = self.chunks.home.length, []
        for first, stop in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            copy, chunk = np.nonzero(picked[first:stop].T)
            marks.append(copy * length + self._ends[first:stop][chunk])
        layout = Marked(tuple(marks), self.chunks.length)
        return self.queries.beside(self.queries.length, layout=layout, cu_seqlens=self.queries.cu_seqlens)

    def rows(self, picked: np.ndarray) -> HostIndex:
        """Which of this rank's finished chunks these are, as numbers in ``[copies, finished chunks here]``."""
        return HostIndex(np.flatnonzero(picked[self._own].T))

    def share(self, picked: np.ndarray) -> tuple[float, float]:
        """How many of this rank's finished chunks, over all copies, are picked, and how many there are."""
        own = picked[self._own]
        return float(own.sum()), float(own.size)


def routed_chunks(shard: SequenceShard, length: int, copies: int) -> RoutedChunks:
    """The plan for a shard cut into chunks of a length; kept on the shard, so that every layer shares it."""
    kept = shard.plans.setdefault(shard, {})
    key = ("routed chunks", length, copies)
    if key not in kept:
        kept[key] = RoutedChunks(chunks_of(shard, length), copies)
    return kept[key]
