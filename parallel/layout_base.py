"""What every layout is, and arithmetic on runs of positions; the layouts themselves are in `layouts.py`."""

from abc import ABC, abstractmethod

import numpy as np


class Layout(ABC):
    """Which positions each rank holds: a few lines, made into shards by `SequenceShard`.

    Every position belongs to exactly one rank (checked when a shard is made). All ranks must come to the same answer
    from the same arguments: no random numbers without a fixed seed, no dependence on the process.
    """

    name: str
    """The name in messages and recipes (the class's own name unless set); ranks that share a sequence agree on it."""

    long_segments: bool = False
    """Whether a rank holds few, long runs of consecutive tokens, which the scans of linear mixers need."""

    def __init_subclass__(cls) -> None:
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    @abstractmethod
    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        """The positions of `rank` as runs [start, stop): int64 [n, 2], increasing and disjoint.

        cu_seqlens: int64 [N+1], document boundaries from 0 to `length`; a layout may cut by documents.
        """

    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        """The number of tokens of `rank` before each position: int64, shaped as `positions` (each in 0 ... length).

        Here it is found by searching the runs; layouts that can count in closed form override it.
        """
        return count_in_runs(positions, self.runs(rank, world, length, cu_seqlens))

    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        """The rank that holds each position: int64, shaped as `positions`. Found by searching the runs of all ranks."""
        held = [self.runs(rank, world, length, cu_seqlens) for rank in range(world)]
        ranks = np.repeat(np.arange(world), [len(runs) for runs in held])
        starts, stops = np.concatenate(held).T
        order = np.flatnonzero(starts < stops)  # an empty run may start where another rank's run does
        order = order[np.argsort(starts[order])]
        return ranks[order][np.searchsorted(starts[order], positions, side="right") - 1]


def count_in_runs(positions: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """The number of tokens in `runs` [n, 2] before each position, by run-length arithmetic; int64."""
    positions = np.asarray(positions, dtype=np.int64)
    if len(runs) == 0:
        return np.zeros_like(positions)
    starts, lengths = runs[:, 0], runs[:, 1] - runs[:, 0]
    before = np.cumsum(lengths) - lengths  # tokens in the runs ahead of each run
    # The last run that starts at or before the position; ahead of the first run the clip leaves nothing.
    run = np.maximum(np.searchsorted(starts, positions, side="right") - 1, 0)
    return before[run] + np.clip(positions - starts[run], 0, lengths[run])


def positions_in_runs(runs: np.ndarray) -> np.ndarray:
    """The positions that `runs` [n, 2] cover, in increasing order: int64 [T_w]."""
    starts, lengths = runs[:, 0], runs[:, 1] - runs[:, 0]
    total = int(lengths.sum())
    # Token j of the shard lies in run i at start[i] + (j - tokens ahead of run i).
    offset = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return offset + np.arange(total, dtype=np.int64)
