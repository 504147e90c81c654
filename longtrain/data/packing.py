"""Packing: documents laid end to end and cut into sequences of one length, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longtrain.data.documents import Documents
from longtrain.data.vocabulary import BOUNDARY, VOCABULARY


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens with the documents in it."""

    tokens: np.ndarray
    """int64 [T]."""
    labels: np.ndarray
    """int64 [T]: the token that follows in the document, `BOUNDARY` after its last byte, `IGNORE` for none."""
    cu_seqlens: np.ndarray
    """int64 [N+1]: where documents begin, from 0 to T."""


class Sequences(Protocol):
    """What training and evaluation need to know of data: sequences of one length, each a pure function of its index.

    So the position in the data is one integer, and any rank can make any sequence.
    """

    @property
    def length(self) -> int:
        """T, tokens of every sequence."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids; all tokens and labels are below it."""
        ...

    @property
    def groups(self) -> tuple[int, ...]:
        """Kinds of sequences, whose accuracy is told one by one (for mqar numbers of pairs); empty: there are none."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short text that differs when any sequence would: a position in the data means nothing without it."""
        ...

    def __len__(self) -> int:
        """Sequences before they repeat; larger than any run where they never do."""
        ...

    def group(self, index: int) -> int:
        """Which of `groups`, as its place there, sequence `index` belongs to; 0 where there are none."""
        ...

    def sequence(self, index: int) -> PackedSequence:
        """Make sequence `index` from 0."""
        ...

    def describe(self) -> str:
        """Say in a few words what there is."""
        ...


class PackedSequences:
    """An endless row of sequences of equal length, cut from documents: `sequence(index)` is a pure function of `index`.

    So the position in the data is one integer, and any rank can make any sequence.

    A document of n bytes is n + 1 tokens: `BOUNDARY` and its bytes. Every token's label is the token that follows it,
    and the label of the last byte is `BOUNDARY`. The documents of an epoch lie end to end and are cut every `length`
    tokens. A document that a cut goes through continues in the next sequence as a document of its own, which nothing
    in the first part can be seen from; the last token before the cut still has the byte after the cut as its label.
    What is left at the end of an epoch, less than one sequence, is dropped; each epoch drops another part.

    `seed` an integer: every epoch has its own order of documents, drawn from (seed, epoch).
    `seed` None: the order is the one given, in every epoch.
    """

    vocabulary = VOCABULARY
    groups: tuple[int, ...] = ()

    def __init__(self, documents: Documents, length: int, *, seed: int | None) -> None:
        if length < 1:
            raise ValueError(f"length: got {length}, expected at least 1 token")
        if seed is not None and seed < 0:
            raise ValueError(f"seed: got {seed}, expected None or an integer from 0")
        self.documents = documents
        self.length = length
        self.seed = seed
        # An epoch; its documents as they lie in it [N]; the token after each of them, from the epoch's start [N].
        self._laid_out: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all documents: their bytes and one boundary each."""
        return int(self.documents.sizes.sum()) + len(self.documents.sizes)

    @property
    def fingerprint(self) -> str:
        """A short text that differs when any sequence would: a position in the data means nothing without it."""
        return f"{self.documents.fingerprint}-{self.length}-{self.seed}"

    def __len__(self) -> int:
        """Sequences in one epoch."""
        return self.tokens // self.length

    def group(self, index: int) -> int:
        """Always 0: packed text has no kinds of sequences."""
        return 0

    def describe(self) -> str:
        """Say in a few words what there is: '412 files, 8.3 MB, 2,031 sequences of 4,096 tokens'."""
        sizes = self.documents.sizes
        text = f"{len(sizes):,} files, {sizes.sum() / 1e6:,.1f} MB"
        return f"{text}, {len(self):,} sequences of {self.length:,} tokens"

    def sequence(self, index: int) -> PackedSequence:
        """Make sequence `index` from 0; the count goes on over the epochs."""
        tokens = np.empty(self.length, dtype=np.int64)
        labels = np.empty(self.length, dtype=np.int64)
        boundaries = [0]
        for document, first, last in self._parts(index):
            # This part of the document is the tokens [first, last) of its size + 1; token i + 1 is byte i.
            size = int(self.documents.sizes[document])
            read_from = max(first - 1, 0)
            content = self.documents.read(document, read_from, min(last, size)).astype(np.int64)
            here = slice(boundaries[-1], boundaries[-1] + last - first)
            # One token before and one after what was read: the row that both tokens and labels are cut from.
            row = np.concatenate(([BOUNDARY], content, [BOUNDARY]))
            skip = 1 if first > 0 else 0
            tokens[here] = row[skip : skip + last - first]
            labels[here] = row[skip + 1 : skip + 1 + last - first]
            boundaries.append(here.stop)
        return PackedSequence(tokens, labels, np.array(boundaries, dtype=np.int64))

    def boundaries(self, index: int) -> np.ndarray:
        """`cu_seqlens` of sequence `index`, without reading a file."""
        sizes = [last - first for _, first, last in self._parts(index)]
        return np.cumsum([0, *sizes], dtype=np.int64)

    def _parts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """The documents in sequence `index`, and which tokens [first, last) of each."""
        if index < 0 or len(self) == 0:
            raise ValueError(f"index: got {index}, expected 0 or more, of data with one sequence at least")
        epoch, place = divmod(index, len(self))
        order, ends = self._lay_out(epoch)
        start, stop = place * self.length, (place + 1) * self.length
        slot = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            document, end = int(order[slot]), min(int(ends[slot]), stop)
            begin = int(ends[slot]) - int(self.documents.sizes[document]) - 1
            yield document, start - begin, end - begin
            start, slot = end, slot + 1

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the documents in an epoch and where each ends; the last one asked for is kept."""
        kept = self._laid_out  # in one piece: batches are made in a thread beside others that may read
        if kept is None or kept[0] != epoch:
            order = _permutation(len(self.documents.sizes), self.seed, epoch)
            kept = self._laid_out = epoch, order, np.cumsum(self.documents.sizes[order] + 1)
        return kept[1], kept[2]


def _permutation(count: int, seed: int | None, epoch: int) -> np.ndarray:
    """A random order of `count` things for (seed, epoch), int64 [count]."""
    if seed is None:
        return np.arange(count, dtype=np.int64)
    # Sorting a bit generator's raw numbers, because numpy promises that those stay the same in later versions; it
    # does not promise that for `Generator.permutation`, and a checkpoint may outlive a version.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch)))
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)
