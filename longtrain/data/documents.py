"""Documents: byte strings that are read piece by piece, never loaded whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from longtrain.errors import UsageError


class Documents(Protocol):
    """What packing needs to know of a collection of documents."""

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of every document, int64 [N], all above zero."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short text that differs when the documents, their sizes or their order do."""
        ...

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Read bytes [start, stop) of a document as uint8 [stop - start]."""
        ...


class BytesDocuments:
    """Documents in memory: for tests and for small experiments."""

    def __init__(self, contents: Sequence[bytes]) -> None:
        if not all(contents):
            raise ValueError("contents: got an empty document, expected at least one byte in each")
        self._contents = [np.frombuffer(content, dtype=np.uint8) for content in contents]
        self.sizes = np.array([len(content) for content in contents], dtype=np.int64)
        self.fingerprint = _digest(*(hashlib.sha256(content).hexdigest() for content in contents))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Read bytes [start, stop) of a document as uint8 [stop - start]."""
        return self._contents[document][start:stop]


@dataclass(frozen=True)
class TextFile:
    """A file of the collection, as it was when the collection was listed."""

    path: Path
    name: str
    """Its path relative to the collection's root, with forward slashes: the same on every machine."""
    size: int
    """Bytes."""
    modified: int
    """Time of the last change, nanoseconds: tells a rewritten file of the same size."""

    @property
    def name_hash(self) -> int:
        """The first 8 bytes of the SHA-256 of the name: decides what is held out, and in which order it is read."""
        return int.from_bytes(hashlib.sha256(os.fsencode(self.name)).digest()[:8], "big")


class FileDocuments:
    """One file, one document; only names and sizes are kept, bytes are read when a sequence needs them.

    A file that cannot be read, or that changed since it was listed, raises `UsageError` naming it: the positions of
    every later document would be others, so going on would train on something else than a checkpoint says.
    """

    def __init__(self, files: Sequence[TextFile]) -> None:
        self.files = tuple(files)
        self.sizes = np.array([file.size for file in self.files], dtype=np.int64)
        self.fingerprint = _digest(*(f"{file.size} {file.name}" for file in self.files))

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Read bytes [start, stop) of a document as uint8 [stop - start]."""
        file = self.files[document]
        try:
            with open(file.path, "rb") as handle:
                now = os.fstat(handle.fileno())
                handle.seek(start)
                piece = handle.read(stop - start)
        except OSError as error:
            raise UsageError(f"the text file {file.path} cannot be read: {error.strerror or error}") from error
        if (now.st_size, now.st_mtime_ns) != (file.size, file.modified) or len(piece) != stop - start:
            raise UsageError(
                f"the text file {file.path} was changed while it was in use (it had {file.size} bytes, it has "
                f"{now.st_size}); leave the text alone during a run and start again"
            )
        return np.frombuffer(piece, dtype=np.uint8)


def split_held_out(files: Sequence[TextFile], fraction: float) -> tuple[list[TextFile], list[TextFile]]:
    """Divide files into training and held-out ones by a hash of their names, so the division is the same everywhere.

    A file is held out when its hash, as a number from 0 to 1, is below `fraction`; so new files never move old ones.
    The one exception: where that leaves one side of two or more files empty, the file nearest to it goes there.
    Training files keep their order; held-out files come in the order of their hashes, so that any first part of them
    is a fair sample.
    """
    shuffled = sorted(files, key=lambda file: (file.name_hash, file.name))
    count = sum(file.name_hash < fraction * 2**64 for file in files)
    if len(files) > 1:
        count = min(max(count, 1), len(files) - 1)
    held_out = shuffled[:count]
    names = {file.name for file in held_out}
    return [file for file in files if file.name not in names], held_out


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]
