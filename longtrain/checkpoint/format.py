"""What a checkpoint's files say, and which rows of a tensor a rank holds."""

from __future__ import annotations

import ctypes
import json
import re
import zlib
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

FORMAT = "longtrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
FILE = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True)
class Piece:
    """Rows [offset, offset + rows) of a tensor, in one file under the tensor's name."""

    file: str
    offset: int
    rows: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """This rank's rows [offset, offset + rows) of a tensor of `shape`; a tensor without dimensions is one row."""

    local: Tensor
    shape: tuple[int, ...]
    offset: int
    rows: int
    first_holder: bool | None
    """Of the ranks that hold these rows, whether this one writes them; None: not distributed, rank 0 does."""

    def writes(self, rank: int) -> bool:
        """Say whether this rank, of the group that saves, writes these rows."""
        return rank == 0 if self.first_holder is None else self.first_holder


def part_of(name: str, tensor: Tensor) -> Part:
    """Find out which rows of a tensor this rank holds. Raises ValueError for a placement that it does not know."""
    shape = tuple(tensor.shape)
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Part(tensor, shape, 0, rows_of(shape), None)
    # type(): a strided shard, of FSDP over tensor parallelism, is a subclass in some versions and lies otherwise.
    sharded = [i for i, placement in enumerate(tensor.placements) if type(placement) is Shard]
    replicated = [i for i, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    on_rows = all(placement.dim == 0 for placement in tensor.placements if isinstance(placement, Shard))
    if len(sharded) > 1 or len(sharded) + len(replicated) < len(tensor.placements) or not on_rows:
        raise ValueError(
            f"tensors: {name} is placed {tensor.placements}, expected Shard(0) over at most one mesh dimension and "
            "Replicate() over the others"
        )
    local = tensor.to_local()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # a rank outside the mesh holds nothing
        return Part(local, shape, 0, 0, False)
    writes = all(coordinate[i] == 0 for i in replicated)
    if not sharded:
        return Part(local, shape, 0, rows_of(shape), writes)
    # Shards are cut like torch.chunk: equal ones of the size rounded up, then a smaller one, then empty ones.
    size = -(-shape[0] // tensor.device_mesh.size(sharded[0]))
    offset = min(coordinate[sharded[0]] * size, shape[0])
    rows = min(size, shape[0] - offset)
    if local.shape[0] != rows:
        raise ValueError(
            f"tensors: {name}: this rank holds {local.shape[0]} rows, expected {rows}, as torch.chunk cuts"
        )
    return Part(local, shape, offset, rows, writes)


def rows_of(shape: tuple[int, ...]) -> int:
    """Count the rows of a shape; one without dimensions is one row."""
    return shape[0] if shape else 1


def dtype_name(tensor: Tensor) -> str:
    """Name a dtype as the manifest does: "float32"."""
    return str(tensor.dtype).removeprefix("torch.")


def crc32_of(tensor: Tensor) -> int:
    """Checksum of a CPU tensor's bytes: against damage, not against forgery."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    # By address: .numpy() would forbid the storage ever to change its size, which FSDP does to gathered weights.
    return zlib.crc32((ctypes.c_ubyte * size).from_address(tensor.data_ptr())) if size else 0


def canonical(content: object) -> str:
    """Write JSON in one form, for the checksum. Raises TypeError or ValueError for what JSON cannot hold."""
    return json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
