"""Writing a checkpoint: every rank its own shard, rank 0 the manifest, under its own name only when it is whole."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from longtrain.checkpoint.format import (
    FORMAT,
    MANIFEST,
    VERSION,
    Entry,
    Piece,
    canonical,
    crc32_of,
    dtype_name,
    part_of,
    rows_of,
)
from longtrain.checkpoint.ranks import place, together
from longtrain.errors import UsageError


def save(
    folder: Path, *, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], group: dist.ProcessGroup | None = None
) -> None:
    """Write a checkpoint; all ranks of `group` call it (None: all processes, or this one alone).

    tensors: the same names, shapes and dtypes on all ranks. What is not a `DTensor` is taken from rank 0.
    numbers: anything JSON can hold (step, position in the data, random states as lists); taken from rank 0.

    The files are written into a hidden folder beside `folder` and flushed to the disk; rank 0 writes the manifest last
    and renames the folder, so under its own name a checkpoint is always whole. All ranks need to see one file system.
    Raises `UsageError` on all ranks when `folder` exists already or the disk refuses.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.writing")
    rank, _ = place(group)
    what = f"the checkpoint {folder} cannot be written"

    def clean_up() -> None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)

    together(lambda: _begin(folder, temporary, numbers) if rank == 0 else None, group, what, undo=clean_up)
    shards = together(lambda: _write_shard(temporary, tensors, rank), group, what, undo=clean_up)
    together(lambda: _finish(folder, temporary, shards, numbers) if rank == 0 else None, group, what, undo=clean_up)


@dataclass(frozen=True)
class _Shard:
    """What one rank wrote."""

    entries: dict[str, Entry]
    file: str
    size: int


def _begin(folder: Path, temporary: Path, numbers: Mapping[str, Any]) -> None:
    canonical(dict(numbers))  # what JSON cannot hold raises here, before anything is written
    if folder.exists():
        raise UsageError(f"the checkpoint {folder} exists already; remove it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a save that was killed
    temporary.mkdir()


def _write_shard(temporary: Path, tensors: Mapping[str, Tensor], rank: int) -> _Shard:
    if not temporary.is_dir():
        raise UsageError(f"{temporary} is not there on rank {rank}: all ranks must see one file system")
    file = f"rank-{rank:05d}.safetensors"
    entries: dict[str, Entry] = {}
    contents: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        part = part_of(name, tensor)
        pieces: tuple[Piece, ...] = ()
        if part.writes(rank) and part.rows > 0:
            content = part.local.to("cpu").contiguous()
            storage = content.untyped_storage().data_ptr()
            # safetensors refuses two tensors in one storage (tied weights under two names): each gets its own.
            contents[name] = content.clone() if storage in storages else content
            storages.add(storage)
            pieces = (Piece(file, part.offset, part.rows, crc32_of(content)),)
        entries[name] = Entry(part.shape, dtype_name(tensor), pieces)
    size = 0
    if contents:
        save_file(contents, temporary / file)
        size = _flush(temporary / file)
    return _Shard(entries, file, size)


def _finish(folder: Path, temporary: Path, shards: list[_Shard], numbers: Mapping[str, Any]) -> None:
    content = {
        "world_size": len(shards),
        "numbers": dict(numbers),
        "tensors": _merge(shards),
        "files": {shard.file: shard.size for shard in shards if shard.size},
    }
    # The checksum is of what reading gives back: JSON turns keys that are numbers into text, which sorts otherwise.
    content = json.loads(canonical(content))
    checksum = zlib.crc32(canonical(content).encode())
    manifest = {"format": FORMAT, "version": VERSION, "crc32": checksum, "content": content}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n")
    _flush(temporary / MANIFEST)
    _flush(temporary)
    temporary.rename(folder)
    _flush(folder.parent)


def _merge(shards: list[_Shard]) -> dict[str, Any]:
    """The manifest's tensors from what every rank wrote; refuses ranks that disagree and rows that nobody wrote."""
    first = shards[0].entries
    for rank, shard in enumerate(shards):
        if shard.entries.keys() != first.keys():
            name = min(shard.entries.keys() ^ first.keys())
            raise ValueError(f"tensors: {name} is not given on both rank 0 and rank {rank}, expected the same names")
    merged = {}
    for name, entry in first.items():
        pieces: list[Piece] = []
        for rank, shard in enumerate(shards):
            other = shard.entries[name]
            if (other.shape, other.dtype) != (entry.shape, entry.dtype):
                raise ValueError(
                    f"tensors: {name} is {entry.dtype} {entry.shape} on rank 0 and {other.dtype} {other.shape} on "
                    f"rank {rank}, expected the same"
                )
            pieces += other.pieces
        pieces.sort(key=lambda piece: piece.offset)
        stop = 0
        for piece in pieces:
            if piece.offset != stop:
                break
            stop += piece.rows
        if stop != rows_of(entry.shape) or sum(piece.rows for piece in pieces) != stop:
            raise ValueError(f"tensors: {name}: its shards do not make up the whole exactly once; is a rank missing?")
        merged[name] = {
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "pieces": [vars(piece) for piece in pieces],
        }
    return merged


def _flush(path: Path) -> int:
    """Force a file or folder to the disk; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
