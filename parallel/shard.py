"""SequenceShard: one rank's part of a sequence, and how tensors get there, back, and from one layout to another.

A shard is the one object that knows which tokens this rank holds. It shards inputs, labels and positions alike, so they
cannot disagree, and every sequence-parallel operator takes it. It is made once per batch (the documents change), on the
host: what it knows is numpy, computed once and kept, real data also under fake tensors.

Letters: T tokens of the whole sequence, W ranks that share it, T_w tokens of this rank, N documents.
"""

import hashlib
import itertools
import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longtrain.kernels.checks import attention_window, document_offsets
from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.parallel import moves
from longtrain.parallel.bounds import Bounds
from longtrain.parallel.communication import Grid, Group, grid_of, rank_and_size, same_group
from longtrain.parallel.layouts import Layout, check_partition, is_built_in, layout_named, positions_in_runs
from longtrain.parallel.moves import HostIndex, RelayoutPlan

Boundaries = Tensor | np.ndarray | Sequence[int]
_SHOWN = 6  # document boundaries in a message; the rest is stood for by a checksum

# Registered operators take numbers, not objects: a shard goes in by its handle and is looked up inside, as torch does
# with the names of process groups. The table keeps no shard alive.
_handles = itertools.count(1)
_by_handle: "WeakValueDictionary[int, SequenceShard]" = WeakValueDictionary()


def shard_of(handle: int) -> "SequenceShard":
    """The shard with this `handle`; a RuntimeError where it is gone."""
    shard = _by_handle.get(handle)
    if shard is None:
        raise RuntimeError(
            "a SequenceShard was deleted before the backward pass of a call that used it; keep it until then"
        )
    return shard


class Segment(NamedTuple):
    """A maximal run of consecutive tokens of one document on one rank, in local indices [start, stop)."""

    start: int
    stop: int
    first_in_document: bool  # its first token is the document's first
    last_in_document: bool  # its last token is the document's last


class SequenceShard:
    """One rank's tokens of a sequence that a process group shares; not changed once made.

    length: T >= 0. group: a process group of any subset of the processes, or a one-dimensional DeviceMesh; one of two
    dimensions has its slow links along the first (between nodes) and its fast links along the second (inside a node);
    None is this process alone. layout: "contiguous", "zigzag", "striped", "striped:128", "balanced" or a `Layout`.
    cu_seqlens: where packed documents begin, int32 or int64 [N+1] from 0 to T, never decreasing (list, numpy or
    tensor); None is one document. All ranks of the group give the same arguments. Anything else is a ValueError.

    Attributes: `length`, `group` (all ranks) and `grid` (their rows, for meshes of two dimensions), `rank` and `world`
    (in the group), `layout`, `cu_seqlens` (numpy int64 [N+1]), `lengths` (T_w of every rank), `local_length` (this
    rank's); the rest are properties.
    """

    length: int
    group: Group
    grid: Grid
    rank: int
    world: int
    layout: Layout
    cu_seqlens: np.ndarray
    lengths: tuple[int, ...]
    local_length: int
    handle: int
    """The number by which registered operators know this shard (`shard_of`)."""
    agreed: set[str]
    """Signatures of calls that the ranks have found to be the same on all of them (`agreement.py`)."""
    plans: "WeakKeyDictionary[SequenceShard, dict[tuple[object, ...], Any]]"
    """What operators worked out for calls with this shard, by key shard and options: made once, used by every layer."""

    _ranks: "dict[int, SequenceShard]"
    _layouts: "list[SequenceShard]"
    _bounds: "WeakKeyDictionary[SequenceShard, dict[tuple[object, ...], Bounds]]"
    _relayouts: "WeakKeyDictionary[SequenceShard, RelayoutPlan]"

    def __init__(
        self,
        length: int,
        group: Group | DeviceMesh = None,
        layout: str | Layout = "contiguous",
        cu_seqlens: Boundaries | None = None,
    ) -> None:
        grid = grid_of(group)
        rank, world = rank_and_size(grid.group)
        self._set_up(length, layout, cu_seqlens, grid=grid, rank=rank, world=world)

    @classmethod
    def pretend(
        cls,
        length: int,
        *,
        rank: int,
        world: int,
        layout: str | Layout = "contiguous",
        cu_seqlens: Boundaries | None = None,
        rows: int = 1,
    ) -> "SequenceShard":
        """The shard that `rank` of `world` would have, without a group: for planners and tests. It sends nothing.

        rows: the first size of the two-dimensional mesh that is pretended; 1 is a plain group.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank} of world {world}, expected 0 ... {world - 1}")
        if rows < 1 or world % rows:
            raise ValueError(f"rows: got {rows}, expected a divisor of world = {world}")
        shard = cls.__new__(cls)
        grid = Grid(None, None, None, rows, world // rows)
        shard._set_up(length, layout, cu_seqlens, grid=grid, rank=rank, world=world)
        return shard

    def _set_up(
        self,
        length: int,
        layout: str | Layout,
        cu_seqlens: Boundaries | None,
        *,
        grid: Grid,
        rank: int,
        world: int,
    ) -> None:
        length = _whole_number(length)
        offsets = _offsets(cu_seqlens, length)
        offsets.setflags(write=False)
        layout = layout_named(layout)
        check_partition(layout, world, length, offsets)
        end = np.array([length], dtype=np.int64)
        lengths = tuple(int(layout.count(end, other, world, length, offsets)[0]) for other in range(world))
        self._keep(grid, rank, length=length, world=world, layout=layout, cu_seqlens=offsets, lengths=lengths)

    def _keep(self, grid: Grid, rank: int, **facts: object) -> None:
        # Straight into __dict__: attributes cannot be set afterwards.
        self.__dict__.update(
            facts, grid=grid, group=grid.group, rank=rank, handle=next(_handles), agreed=set(), _ranks={}, _layouts=[],
            plans=WeakKeyDictionary(), _bounds=WeakKeyDictionary(), _relayouts=WeakKeyDictionary(),
        )  # fmt: skip
        self.__dict__["local_length"] = self.lengths[rank]
        _by_handle[self.handle] = self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a SequenceShard is not changed once made: make another one instead of setting {name!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> "SequenceShard":
        return self  # it never changes, and its group is this process's

    def __repr__(self) -> str:
        runs = [(start, stop) for start, stop in self._runs[:4].tolist() if start < stop]
        shown = " + ".join(f"{start}..{stop - 1}" for start, stop in runs) + (" + ..." if len(self._runs) > 4 else "")
        documents = f"{self.documents} document" + "s" * (self.documents != 1)
        place = f"rank {self.rank} of {self.world}" + (", pretended" if self._pretended else "")
        return (
            f"SequenceShard({place}, {self.layout.name}: {self.local_length} of {self.length} tokens in {documents}, "
            f"positions {shown or 'none'})"
        )

    # ---- what this rank holds -------------------------------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        """[T_w] int64 on the CPU, increasing: the global positions of the tokens held here."""
        return self.held.on("cpu")

    @property
    def document_positions(self) -> Tensor:
        """[T_w] int64 on the CPU: each token's position inside its document, for RoPE."""
        return self._in_document.on("cpu")

    def document_positions_on(self, device: torch.device | str) -> Tensor:
        """`document_positions` on a device, copied there once."""
        return self._in_document.on(device)

    @property
    def documents(self) -> int:
        """N, the number of documents, empty ones included."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """This rank's segments in order: maximal runs of consecutive tokens of one document, none empty."""
        positions, document = self.held.array, self._document
        if not positions.size:
            return ()
        new = (np.diff(positions) != 1) | (np.diff(document) != 0)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1])
        stops = np.append(starts[1:], positions.size)
        first = positions[starts] == self.cu_seqlens[document[starts]]
        last = positions[stops - 1] + 1 == self.cu_seqlens[document[starts] + 1]
        columns = (starts.tolist(), stops.tolist(), first.tolist(), last.tolist())
        return tuple(Segment(*row) for row in zip(*columns, strict=True))

    def as_rank(self, rank: int) -> "SequenceShard":
        """The same shard as another rank of the group has it; it sends nothing."""
        self._check_rank("rank", rank)
        if rank == self.rank:
            return self
        if rank not in self._ranks:
            shard = SequenceShard.__new__(SequenceShard)
            shard._keep(self.grid.silent(), rank, length=self.length, world=self.world, layout=self.layout,
                        cu_seqlens=self.cu_seqlens, lengths=self.lengths)  # fmt: skip
            self._ranks[rank] = shard
        return self._ranks[rank]

    def with_layout(self, layout: str | Layout) -> "SequenceShard":
        """The same sequence, group and documents in another layout; the same object for the same layout each time."""
        wanted = layout_named(layout)
        for shard in (self, *self._layouts):
            if shard.layout is wanted or shard.layout == wanted:
                return shard
        self._layouts.append(self.beside(self.length, layout=wanted, cu_seqlens=self.cu_seqlens))
        return self._layouts[-1]

    def beside(self, length: int, *, layout: str | Layout, cu_seqlens: Boundaries | None = None) -> "SequenceShard":
        """A shard of another sequence over the same ranks; pretended where this one is."""
        shard = SequenceShard.__new__(SequenceShard)
        shard._set_up(length, layout, cu_seqlens, grid=self.grid, rank=self.rank, world=self.world)
        return shard

    # ---- which keys its queries see -------------------------------------------------------------------------------

    def intervals(
        self,
        source: int,
        *,
        key_shard: "SequenceShard | None" = None,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
    ) -> KeyIntervals:
        """Which of rank `source`'s keys each query of this rank sees; kept, so that every layer shares it.

        key_shard: where the keys come from another sequence (cross-attention), their shard: any length and layout, the
        same group and number of documents; document n sees document n, aligned at the end where lengths differ.
        window: (left, right) tokens that a query sees beside its own; None inside the pair is unlimited.
        """
        keys = self if key_shard is None else key_shard
        self._check_rank("source", source)
        self._check_key_shard(keys)
        sides = attention_window(window)
        kept = self._bounds.setdefault(keys, {})
        if (causal, sides) not in kept:
            first, stop = visible_keys(
                self.held.array, causal=causal, window=sides, query_offsets=self.cu_seqlens, key_offsets=keys.cu_seqlens
            )
            kept[causal, sides] = Bounds(first, stop)
        return kept[causal, sides].intervals(keys, source)

    # ---- tensors to the ranks, back, and across -------------------------------------------------------------------

    def split(self, x: Tensor, dim: int) -> Tensor:
        """This rank's tokens of a whole x: [.., T, ..] -> [.., T_w, ..], a copy, in increasing position.

        Sends nothing. Backward gives these tokens their gradient and zeros to all others: this rank's own part.
        """
        return moves.split(x, self, self._check_tokens(x, dim, self.length))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole x on every rank, in order of position: [.., T_w, ..] -> [.., T, ..]. All ranks call it.

        Backward, which all ranks run too, sums the ranks' gradients in the order of the ranks, in float32 (float64 for
        float64), and takes this rank's tokens.
        """
        dim = self._check_tokens(x, dim, self.local_length)
        self._check_sends()
        return moves.gather(x, self, dim)

    def relayout(self, x: Tensor, other: "SequenceShard", dim: int) -> Tensor:
        """x as `other` lays it out: [.., T_w, ..] -> [.., other's T_w, ..], by one all-to-all. All ranks call it.

        other: a shard of the same length over the same group; where it is this shard, x itself is returned. Backward is
        the way back, one all-to-all as well.
        """
        dim = self._check_tokens(x, dim, self.local_length)
        if not same_group(self.group, other.group) or (self.rank, self.world) != (other.rank, other.world):
            raise ValueError(f"other: got {other}, expected a shard over the same group as {self}")
        if other.length != self.length:
            raise ValueError(f"other: got {other.length} tokens, expected {self.length} as in this shard")
        if other is self:
            return x
        self._check_sends()
        return moves.relayout(x, self, other, dim)

    # ---- host data, computed when first needed --------------------------------------------------------------------

    @cached_property
    def signature(self) -> str:
        """What the ranks must agree on, in one line: length, layout and document boundaries."""
        bounds = self.cu_seqlens
        boundaries = str(bounds.tolist())
        if bounds.size > _SHOWN:
            checksum = hashlib.sha256(bounds.tobytes()).hexdigest()[:8]
            head = ", ".join(map(str, bounds[: _SHOWN - 1].tolist()))
            boundaries = f"[{head}, ..., {bounds[-1]}] ({bounds.size - 1} documents, checksum {checksum})"
        layout = repr(self.layout.name)
        if not is_built_in(self.layout):  # names of others do not say all
            runs = [self.layout.runs(rank, self.world, self.length, bounds) for rank in range(self.world)]
            checksum = hashlib.sha256(b"|".join(held.tobytes() for held in runs)).hexdigest()[:8]
            layout += f" (runs of all ranks: checksum {checksum})"
        rows = f" in {self.grid.outer_size} rows" if self.grid.outer_size > 1 else ""
        return f"length {self.length} over {self.world} ranks{rows}, layout {layout}, cu_seqlens {boundaries}"

    @cached_property
    def held(self) -> HostIndex:
        """[T_w]: `positions` as host data."""
        return HostIndex(positions_in_runs(self._runs))

    @cached_property
    def by_rank(self) -> HostIndex:
        """[T]: the positions of rank 0, then those of rank 1 and so on."""
        runs = (self.layout.runs(rank, self.world, self.length, self.cu_seqlens) for rank in range(self.world))
        return HostIndex(np.concatenate([positions_in_runs(held) for held in runs]))

    def owners(self, positions: np.ndarray) -> np.ndarray:
        """The rank that holds each of these positions."""
        return self.layout.owners(positions, self.world, self.length, self.cu_seqlens)

    def relayout_plan(self, other: "SequenceShard") -> RelayoutPlan:
        """Which tokens go where in `relayout` to `other`."""
        if other not in self._relayouts:
            self._relayouts[other] = RelayoutPlan(self, other)
        return self._relayouts[other]

    @cached_property
    def _runs(self) -> np.ndarray:
        return self.layout.runs(self.rank, self.world, self.length, self.cu_seqlens)

    @cached_property
    def _document(self) -> np.ndarray:
        """The document of each token [T_w]; among documents that start together, the one that is not empty."""
        return np.searchsorted(self.cu_seqlens, self.held.array, side="right") - 1

    @cached_property
    def _in_document(self) -> HostIndex:
        return HostIndex(self.held.array - self.cu_seqlens[self._document])

    # ---- checks ---------------------------------------------------------------------------------------------------

    @property
    def _pretended(self) -> bool:
        return self.world != rank_and_size(self.group)[1]

    def _check_sends(self) -> None:
        if self._pretended:
            raise ValueError(f"{self} has no group to send in; make it with SequenceShard(..., group=group)")

    def _check_rank(self, name: str, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise ValueError(f"{name}: got {rank}, expected a rank of the group, 0 ... {self.world - 1}")

    def _check_tokens(self, x: Tensor, dim: int, tokens: int) -> int:
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim: got {dim}, expected a dimension of x, whose shape is {list(x.shape)}")
        if x.shape[dim] != tokens:
            raise ValueError(f"x: got shape {list(x.shape)}, expected {tokens} tokens in dim {dim} for {self}")
        return dim % x.dim()

    def _check_key_shard(self, keys: "SequenceShard") -> None:
        if not same_group(self.group, keys.group) or self.world != keys.world:
            raise ValueError(f"key_shard: got {keys}, expected a shard over the same group as {self}")
        if keys.documents != self.documents:
            raise ValueError(f"key_shard: got {keys.documents} documents, expected {self.documents} as in the queries")


def _whole_number(length: object) -> int:
    try:
        number = -1 if isinstance(length, bool) else operator.index(cast(Any, length))
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"length: got {length!r}, expected a whole number of tokens from 0 on")
    return number


def _offsets(cu_seqlens: Boundaries | None, length: int) -> np.ndarray:
    """Checked document boundaries as int64 [N+1], a copy."""
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor | np.ndarray):
        listed = np.array(cu_seqlens)
        # A list of whole numbers has no dtype of its own to refuse.
        cu_seqlens = listed.astype(np.int64) if listed.dtype.kind == "i" else listed
    return document_offsets("cu_seqlens", cu_seqlens, tokens=length)
