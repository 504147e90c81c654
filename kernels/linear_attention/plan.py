"""How the Triton kernels cut segments into parts and parts into chunks: host data, known before any number is.

A part is a run of whole chunks of one segment that one program walks through with the state in its registers. A few
parts for each segment are enough to fill a card even for one row: their number follows from how many programs the
architecture runs at a time and never from the decays or the number of documents.

Letters: P parts of a row (the same for every row), C tokens of a chunk, M chunks of a row, N segments.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

START, STOP, SEGMENT, CHUNK = range(4)  # columns of `Plan.parts`


@dataclass(frozen=True)
class Plan:
    """The parts of a row.

    parts: int32 [P, 4], a part's first token, the one behind its last, its segment, and its first chunk in the row.
    first: int32 [N + 1], each segment's first part; every segment has at least one, an empty segment an empty one.
    """

    parts: np.ndarray
    first: np.ndarray
    size: int  # C
    device: torch.device

    @property
    def count(self) -> int:
        """P."""
        return len(self.parts)

    @property
    def segments(self) -> int:
        """N."""
        return len(self.first) - 1

    @property
    def split(self) -> bool:
        """Whether any segment has several parts; where none has, parts are segments."""
        return self.count > self.segments

    @cached_property
    def chunks(self) -> int:
        """M."""
        return int(self._chunks.sum())

    @cached_property
    def on_device(self) -> Tensor:
        """`parts`."""
        return self._move(self.parts)

    @cached_property
    def first_on_device(self) -> Tensor:
        return self._move(self.first)

    @cached_property
    def chunk_table(self) -> Tensor:
        """int32 [M, 2]: each chunk's first token and the one behind its last."""
        part = np.repeat(np.arange(self.count), self._chunks)
        start = self.parts[part, START] + self.size * (np.arange(self.chunks) - self.parts[part, CHUNK])
        stop = np.minimum(start + self.size, self.parts[part, STOP])
        return self._move(np.stack((start, stop), 1).astype(np.int32))

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The first and the last part of each segment, int64 [N]."""
        return self._move(self.first[:-1].astype(np.int64)), self._move(self.first[1:].astype(np.int64) - 1)

    def needed(self, *, forward: bool, whole: bool) -> Tensor:
        """int32: the parts whose summaries are needed: all, or those that another part of their segment follows."""
        wanted = np.ones(self.count, dtype=bool)
        if not whole:
            wanted[self.first[1:] - 1 if forward else self.first[:-1]] = False
        return self._move(np.flatnonzero(wanted).astype(np.int32))

    @property
    def _chunks(self) -> np.ndarray:
        """Of each part."""
        return _ceil(self.parts[:, STOP] - self.parts[:, START], self.size)

    def _move(self, x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(self.device)


def plan(offsets: np.ndarray, *, size: int, part_tokens: int, device: torch.device) -> Plan:
    """Cut the segments with boundaries `offsets` [N+1] into parts of about `part_tokens` tokens, alike in a segment."""
    lengths = np.diff(offsets)
    counts = np.maximum(1, _ceil(lengths, part_tokens))
    first = np.concatenate(([0], counts.cumsum()))
    segment = np.repeat(np.arange(len(lengths)), counts)
    # Equal numbers of chunks, so that the parts of a segment end together.
    chunks = _ceil(lengths, size)
    each = _ceil(chunks, counts) * size
    end = offsets[segment + 1]
    start = np.minimum(offsets[segment] + (np.arange(first[-1]) - first[segment]) * each[segment], end)
    stop = np.minimum(start + each[segment], end)
    chunks = _ceil(stop - start, size)
    table = np.stack((start, stop, segment, chunks.cumsum() - chunks), 1)
    return Plan(table.astype(np.int32), first.astype(np.int32), size, device)


def _ceil(x: np.ndarray, divisor: np.ndarray | int) -> np.ndarray:
    return (x + divisor - 1) // divisor
