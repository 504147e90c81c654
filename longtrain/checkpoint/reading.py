"""Reading a checkpoint at any world size: each rank only the pieces that it needs, each piece checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longtrain.checkpoint.format import (
    FILE,
    FORMAT,
    MANIFEST,
    VERSION,
    Entry,
    Part,
    Piece,
    canonical,
    crc32_of,
    dtype_name,
    part_of,
)
from longtrain.checkpoint.ranks import together
from longtrain.errors import UsageError


def load(folder: Path, *, into: Mapping[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, Any]:
    """Read a checkpoint into tensors that exist, in place, and return its numbers; all ranks of `group` call it.

    World size and sharding may be others than those that saved it; names, shapes and dtypes must be the same.
    Each rank reads, and checks, only the pieces that it needs. Raises `UsageError` on all ranks, naming the file or
    the first tensors: missing, damaged or foreign files, names that lack or are too many, other shapes or dtypes.
    After an error `into` may be partly overwritten.
    """
    folder = Path(folder)
    numbers: dict[str, Any] = {}

    def read() -> None:
        with _Reader(folder) as reader:
            reader.check(into)
            for name, tensor in into.items():
                reader.copy(name, part_of(name, tensor))
            numbers.update(reader.numbers)

    together(read, group, f"the checkpoint {folder} cannot be read")
    return numbers


def read_numbers(folder: Path) -> dict[str, Any]:
    """Read the numbers of a checkpoint alone."""
    return _Reader(Path(folder)).numbers


def read_tensors(folder: Path, *, names: Iterable[str] | None = None, prefix: str = "") -> dict[str, Tensor]:
    """Read whole tensors into this process's memory, on the CPU: those in `names`, or all that begin with `prefix`.

    Keys are full names. Raises `UsageError` for a name that is not there, and for damaged files.
    """
    if names is not None and prefix:
        raise ValueError(f"prefix: got {prefix!r} together with names, expected one of the two")
    with _Reader(Path(folder)) as reader:
        tensors = {}
        for name in [name for name in reader.entries if name.startswith(prefix)] if names is None else names:
            if name not in reader.entries:
                raise UsageError(f"the checkpoint {folder} has no tensor {name}")
            entry = reader.entries[name]
            tensors[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            reader.copy(name, part_of(name, tensors[name]))
        return tensors


class _Reader:
    """An open checkpoint: its manifest, and its files as they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = self._manifest()
        try:
            self.numbers: dict[str, Any] = content["numbers"]
            self.sizes = {str(file): int(size) for file, size in content["files"].items()}
            self.entries = {
                name: Entry(tuple(entry["shape"]), entry["dtype"], tuple(Piece(**piece) for piece in entry["pieces"]))
                for name, entry in content["tensors"].items()
            }
            for name, entry in self.entries.items():
                if not isinstance(getattr(torch, entry.dtype), torch.dtype):
                    raise ValueError(f"{name} has dtype {entry.dtype}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(MANIFEST, f"it does not read as one ({error!r})") from error
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()
        self._stack.close()

    def check(self, into: Mapping[str, Tensor]) -> None:
        """Refuse other names, shapes and dtypes than the checkpoint's."""
        for kind, names in (
            ("lacks", into.keys() - self.entries.keys()),
            ("has, and this model does not,", self.entries.keys() - into.keys()),
        ):
            if names:
                first = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise UsageError(f"the checkpoint {self.folder} {kind} {first}; resume with the recipe that wrote it")
        for name, tensor in into.items():
            entry = self.entries[name]
            ours, theirs = (dtype_name(tensor), tuple(tensor.shape)), (entry.dtype, entry.shape)
            if ours != theirs:
                raise UsageError(
                    f"the checkpoint {self.folder} has {name} as {theirs[0]} {list(theirs[1])}, this model as "
                    f"{ours[0]} {list(ours[1])}; resume with the recipe that wrote it"
                )

    def copy(self, name: str, part: Part) -> None:
        """Fill a rank's part of a tensor from the pieces that overlap it, each checked."""
        filled = 0
        for piece in self.entries[name].pieces:
            start = max(part.offset, piece.offset)
            rows = min(part.offset + part.rows, piece.offset + piece.rows) - start
            if rows <= 0:
                continue
            content = self._read(name, piece)
            if content.dim():
                content = content.narrow(0, start - piece.offset, rows)
                part.local.narrow(0, start - part.offset, rows).copy_(content)
            else:
                part.local.copy_(content)
            filled += rows
        if filled != part.rows:
            raise self._damaged(MANIFEST, f"the pieces of {name} do not make up the whole")

    def _manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not path.is_file():
            missing = f"it has no {MANIFEST}" if self.folder.is_dir() else "there is no such folder"
            raise UsageError(f"{self.folder} is not a longtrain checkpoint: {missing}")
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(MANIFEST, f"it does not read as JSON ({error})") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UsageError(f"{self.folder} is not a longtrain checkpoint: {MANIFEST} is of another format")
        if manifest.get("version") != VERSION:
            raise UsageError(
                f"the checkpoint {self.folder} is of version {manifest.get('version')}, this longtrain reads version "
                f"{VERSION}; use the longtrain that wrote it"
            )
        content = manifest.get("content")
        if manifest.get("crc32") != zlib.crc32(canonical(content).encode()) or not isinstance(content, dict):
            raise self._damaged(MANIFEST, "its checksum is wrong")
        return content

    def _read(self, name: str, piece: Piece) -> Tensor:
        entry = self.entries[name]
        try:
            content = self._file(piece.file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self._damaged(piece.file, str(error)) from error
        shape = (piece.rows, *entry.shape[1:]) if entry.shape else ()
        if tuple(content.shape) != shape or dtype_name(content) != entry.dtype or crc32_of(content) != piece.crc32:
            raise self._damaged(piece.file, f"the checksum of {name} is wrong")
        return content

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not FILE.fullmatch(file):  # never a path that leads elsewhere
                raise self._damaged(MANIFEST, f"{file!r} is no name of a shard")
            if not path.is_file():
                raise self._damaged(file, "the file is missing")
            if path.stat().st_size != self.sizes.get(file):
                raise self._damaged(file, f"it has {path.stat().st_size} bytes instead of {self.sizes.get(file)}")
            self._open[file] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
        return self._open[file]

    def _damaged(self, file: str, how: str) -> UsageError:
        return UsageError(
            f"the checkpoint is damaged: {self.folder / file}: {how}; remove {self.folder} to go on from the one before"
        )
