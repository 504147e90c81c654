"""How tensors move between ranks: the differentiable steps behind `SequenceShard.split`, `gather` and `relayout`.

Each is a linear map that picks or exchanges tokens, so its backward is the map the other way round. Indices are host
data, made once; a copy for each device is kept beside them. Those that send are registered operators (`relayouts.py`).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from longtrain.parallel.communication import all_gather_parts, all_to_all_parts, reduce_scatter_parts

if TYPE_CHECKING:
    from longtrain.parallel.shard import SequenceShard


class HostIndex:
    """An int64 array on the host, and its copies on devices, each made when first asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device | str) -> Tensor:
        """The indices as a tensor on `device`; on the CPU it shares the array's memory."""
        device = torch.device(device)
        if device in self._copies:
            return self._copies[device]
        # Outside inference mode: autograd refuses to keep tensors that were made in it, and these live on.
        with torch.inference_mode(False):
            index = torch.from_numpy(self.array)
            fake = type(index) is not Tensor  # under fake tensors; the real ones must not be replaced by it
            copy = index.to(device)
        if not fake and device.type != "cpu":
            self._copies[device] = copy
        return copy


class RelayoutPlan:
    """Which tokens of one shard go where in another: by rank, and between two ranks in order of position."""

    def __init__(self, source: "SequenceShard", target: "SequenceShard") -> None:
        to, origin = target.owners(source.held.array), source.owners(target.held.array)
        self.send_sizes: list[int] = np.bincount(to, minlength=source.world).tolist()
        self.receive_sizes: list[int] = np.bincount(origin, minlength=source.world).tolist()
        self.send_order = HostIndex(np.argsort(to, kind="stable"))  # local tokens in the order of sending
        self.places = HostIndex(np.argsort(origin, kind="stable"))  # where each received token belongs


def split(x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
    """[.., T, ..] -> [.., T_w, ..]: this rank's tokens; backward puts zeros elsewhere."""
    return cast(Tensor, _Split.apply(x, shard, dim))


def gather(x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
    """[.., T_w, ..] -> [.., T, ..]: everybody's tokens; backward sums over ranks and takes this rank's."""
    return torch.ops.longtrain.gather(x, shard=shard.handle, dim=dim, whole=shard.length)


def relayout(
    x: Tensor, shard: "SequenceShard", other: "SequenceShard", dim: int, *, parts: Sequence[int] | None = None
) -> Tensor:
    """[.., T_w of shard, ..] -> [.., T_w of other, ..]; backward is the relayout from other to shard.

    parts: widths of the tensors of which x ``[B, T_w, width]`` consists; given, the ranks compare x first.
    """
    return torch.ops.longtrain.relayout(
        x, shard=shard.handle, other=other.handle, dim=dim, tokens=other.local_length, parts=parts
    )


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.shape = shard, dim, x.shape
        return x.index_select(dim, shard.held.on(x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        whole = gradient.new_zeros(ctx.shape)
        return whole.index_copy(ctx.dim, ctx.shard.held.on(gradient.device), gradient), None, None


def gathered(x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
    """What `gather` does, unknown to autograd."""
    rows = all_gather_parts(x.movedim(dim, 0), shard.lengths, shard.group)
    return _placed(rows, shard.by_rank, dim)


def summed(x: Tensor, shard: "SequenceShard", dim: int) -> Tensor:
    """[.., T, ..] -> [.., T_w, ..]: this rank's tokens of the sum over ranks."""
    rows = x.movedim(dim, 0).index_select(0, shard.by_rank.on(x.device))
    own = reduce_scatter_parts(rows, shard.lengths, shard.group)
    return own.to(x.dtype).movedim(0, dim).contiguous()


def relaid(x: Tensor, shard: "SequenceShard", other: "SequenceShard", dim: int) -> Tensor:
    """What `relayout` does, unknown to autograd."""
    plan = shard.relayout_plan(other)
    rows = x.movedim(dim, 0).index_select(0, plan.send_order.on(x.device))
    rows = all_to_all_parts(rows, plan.send_sizes, plan.receive_sizes, shard.group)
    return _placed(rows, plan.places, dim)


def _placed(rows: Tensor, places: HostIndex, dim: int) -> Tensor:
    """Rows [n, ..] moved to their places along `dim` of a new contiguous tensor [.., n, ..]."""
    moved = rows.movedim(0, dim)
    return torch.empty_like(moved, memory_format=torch.contiguous_format).index_copy_(
        dim, places.on(rows.device), moved
    )
