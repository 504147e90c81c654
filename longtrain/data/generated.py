"""Made-up sequences: a random stream for each index, that no version of numpy changes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from longtrain.data.packing import PackedSequence
from longtrain.data.vocabulary import IGNORE

# Which stream of random numbers a sequence is drawn from. Held-out sequences have one of their own, the same for every
# seed, so that runs with different seeds are measured on the same questions.
_TRAINING, _HELD_OUT = 0, 1

_ENDLESS = 2**62  # more sequences than any run uses


class Draws:
    """Random draws for one sequence.

    Made from a bit generator's raw numbers, because numpy promises that those stay the same in later versions; it does
    not promise that for its distributions, and a checkpoint may outlive a version.
    """

    def __init__(self, seed: int | None, index: int) -> None:
        stream = (_HELD_OUT, index) if seed is None else (_TRAINING, index)
        self._bits = np.random.PCG64(np.random.SeedSequence(seed or 0, spawn_key=stream))

    def below(self, stop: int, count: int) -> np.ndarray:
        """`count` independent whole numbers from 0 to `stop` - 1, int64."""
        return (self._bits.random_raw(count) % np.uint64(stop)).astype(np.int64)

    def uniform(self, count: int) -> np.ndarray:
        """`count` numbers above 0 and below 1, float64."""
        return ((self._bits.random_raw(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def distinct(self, stop: int, count: int) -> np.ndarray:
        """`count` different whole numbers from 0 to `stop` - 1 in random order, int64."""
        return np.argsort(self._bits.random_raw(stop), kind="stable")[:count].astype(np.int64)

    def distinct_weighted(self, weights: np.ndarray, count: int) -> np.ndarray:
        """`count` different places in `weights` [n], drawn one after the other, each in proportion to its weight.

        The order of exponential waiting times with these rates is that of such draws, so sorting does them at once
        ("Weighted random sampling with a reservoir").
        """
        waiting = -np.log(self.uniform(len(weights))) / weights
        return np.argsort(waiting, kind="stable")[:count].astype(np.int64)


class GeneratedSequences(ABC):
    """An endless row of made-up sequences of T tokens, each one document: `sequence(index)` is a pure function of
    (seed, index).

    length: T. seed: an integer from 0, for training; None: held-out sequences, which depend on no seed and have random
    numbers of their own. Subclasses write `draw`.
    """

    vocabulary: int
    groups: tuple[int, ...] = ()

    def __init__(self, length: int, *, seed: int | None) -> None:
        self.length = length
        self.seed = seed

    @property
    @abstractmethod
    def name(self) -> str:
        """What the sequences are, with every option that changes them: 'mqar of 4, 8 pairs, vocabulary 256'."""

    @abstractmethod
    def draw(self, draws: Draws, group: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, both int64 [T], labels `IGNORE` where nothing is asked. group: of `groups`, by place."""

    @property
    def fingerprint(self) -> str:
        """A short text that differs when any sequence would."""
        return f"{self.name}-{self.length}-{self.seed}"

    def __len__(self) -> int:
        """Larger than any run: the sequences do not repeat."""
        return _ENDLESS

    def describe(self) -> str:
        """Say in a few words what there is."""
        return f"{self.name}, sequences of {self.length:,} tokens without end"

    def group(self, index: int) -> int:
        """The groups take turns, so that any stretch of sequences has as many of each."""
        return index % max(len(self.groups), 1)

    def sequence(self, index: int) -> PackedSequence:
        """Make sequence `index` from 0."""
        if index < 0:
            raise ValueError(f"index: got {index}, expected 0 or more")
        tokens, labels = self.draw(Draws(self.seed, index), self.group(index))
        return PackedSequence(tokens, labels, np.array([0, self.length], dtype=np.int64))


def answers_at_end(row: np.ndarray, answers: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels [T] of a row of T + 1 tokens of which the last `answers` are to be predicted."""
    labels = np.full(len(row) - 1, IGNORE, dtype=np.int64)
    labels[-answers:] = row[-answers:]
    return row[:-1].copy(), labels
