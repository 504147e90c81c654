"""Cutting segments into chunks, chunks into tiles; tensors of tokens into tiles and back.

A chunk is up to C consecutive tokens of one segment, never of two, so nothing that a chunk computes has to be masked
by document. A segment's last chunk may be short; it is padded at its end with zeros, which add nothing to a state. A
tile is a handful of chunks that are computed together and whose tensors fit a processor's cache: memory besides the
inputs and outputs is that of one tile (and of one state per chunk, in backward), whatever T.

In a tile, tensors are [m, H, C, K]: m chunks, heads before tokens, so that a matrix product over all chunks and heads
is one call. Letters beyond DESIGN's: C tokens of a chunk, m chunks of a tile, N segments of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Numbers in a tensor of a tile, on average over [m, H, C, K], [m, H, C, V] and [m, H, C, C]. On a CPU half a megabyte
# in float32, so that the tile's dozen tensors stay near the processor (measured, H 4, K = V = 64: 1.8 us a token,
# against 3.3 us with tiles of 2,048 tokens). An accelerator wants few large calls instead.
_CPU_TILE, _DEVICE_TILE = 2**17, 2**24

_CHUNK_SIZES = (64, 32, 16)


class Run(NamedTuple):
    """The part of one segment that lies in one tile: `full` chunks of C tokens, then one of `rest` tokens if any."""

    segment: int  # counted over rows: row * N + n
    row: int
    start: int  # token, in the row
    chunk: int  # of the tile
    full: int
    rest: int
    first: bool  # the segment begins here
    last: bool  # the segment ends here

    @property
    def stop(self) -> int:
        """The tile's chunk behind the run."""
        return self.chunk + self.full + (self.rest > 0)


@dataclass(frozen=True)
class Tile:
    """What a tile holds: m chunks of C = `size` tokens, from one or more runs of consecutive tokens."""

    size: int
    runs: Sequence[Run]

    @property
    def chunks(self) -> int:
        """m."""
        return self.runs[-1].stop

    def load(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """This tile's part of x [B, T, H, K] as [m, H, C, K] in `dtype`, a copy, with zeros where a chunk is padded."""
        loaded = x.new_empty((self.chunks, x.shape[2], self.size, x.shape[3]), dtype=dtype)
        for run in self.runs:
            full, rest, short = self._parts(run, x)
            if full is not None:
                loaded[run.chunk : short].copy_(full)
            if rest is not None:
                loaded[short, :, : run.rest].copy_(rest)
                loaded[short, :, run.rest :].zero_()
        return loaded

    def store(self, loaded: Tensor, x: Tensor) -> None:
        """The reverse of `load`; where x has fewer heads, those that share one of x's are summed."""
        if loaded.shape[1] != x.shape[2]:
            loaded = loaded.unflatten(1, (x.shape[2], -1)).sum(2)
        for run in self.runs:
            full, rest, short = self._parts(run, x)
            if full is not None:
                full.copy_(loaded[run.chunk : short])
            if rest is not None:
                rest.copy_(loaded[short, :, : run.rest])

    def _parts(self, run: Run, x: Tensor) -> tuple[Tensor | None, Tensor | None, int]:
        """Views of x [B, T, H, K]: a run's full chunks [n, H, C, K], its rest [H, tokens, K]; and the rest's chunk."""
        row, full, rest = x[run.row], None, None
        middle = run.start + run.full * self.size
        if run.full:
            full = row[run.start : middle].view(run.full, self.size, *x.shape[2:]).transpose(1, 2)
        if run.rest:
            rest = row[middle : middle + run.rest].transpose(0, 1)
        return full, rest, run.chunk + run.full


@dataclass(frozen=True)
class Chunking:
    """All tiles, in order: row after row, segment after segment."""

    size: int  # C
    rows: int  # B
    lengths: np.ndarray  # int64 [N]: tokens of each segment of a row
    tiles: Sequence[Tile]


def chunked(offsets: np.ndarray, *, rows: int, heads: int, key_width: int, value_width: int, on_cpu: bool) -> Chunking:
    """Cut `rows` rows, each of segments with boundaries `offsets` int64 [N+1], into chunks and tiles."""
    lengths = np.diff(offsets)
    size = _chunk_size(lengths, key_width, value_width)
    budget = _CPU_TILE if on_cpu else _DEVICE_TILE
    per_tile = max(1, 3 * budget // (heads * size * (key_width + value_width + size)))
    tiles: list[Tile] = []
    runs: list[Run] = []
    room = per_tile  # chunks that the current tile still takes
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    for segment, (start, stop) in enumerate(bounds * rows):
        at = start
        while at < stop:
            taken = min(room * size, stop - at)
            full, rest = divmod(taken, size)
            first, last = at == start, at + taken == stop
            runs.append(Run(segment, segment // len(bounds), at, per_tile - room, full, rest, first, last))
            at += taken
            room -= full + (rest > 0)
            if not room:
                tiles.append(Tile(size, runs))
                runs, room = [], per_tile
    if runs:
        tiles.append(Tile(size, runs))
    return Chunking(size, rows, lengths, tiles)


def _chunk_size(lengths: np.ndarray, key_width: int, value_width: int) -> int:
    """The C that costs least: long chunks for long segments, short ones where most of a long chunk would be padding."""

    def cost(size: int) -> int:
        chunks = int((-(-lengths // size)).sum())
        within = size * size * (key_width + value_width)
        across = 2 * size * key_width * value_width
        state = 64 * key_width * value_width + 100_000  # carrying the state: few operations, but a call for each chunk
        return chunks * (within + across + state)

    return min(_CHUNK_SIZES, key=cost)  # the largest where all are equal
