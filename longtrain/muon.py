"""Muon, an optimizer for the matrices inside a model, on weights that are sharded over ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longtrain.parallel.communication import all_to_all_parts

# "Muon: An optimizer for hidden layers in neural networks" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
# the odd quintic a x + b x^3 + c x^5 whose iteration drives all singular values near 1 fastest from small ones.
_QUINTIC = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class Slice:
    """Some of a matrix's numbers, in order, inside a flat tensor that holds such slices of many matrices."""

    shape: tuple[int, int]
    offset: int  # in the flat tensor
    size: int
    held: tuple[int, ...]  # numbers of the matrix on each rank of the group; rank by rank they make it up


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each step moves a matrix along the nearest (semi-)orthogonal matrix to its momentum.

    ``m = beta m + (1 - beta) g``, ``u = beta m + (1 - beta) g`` (Nesterov), ``W -= rate * sqrt(max(1, rows/columns)) *
    orthogonal(u)``, after decoupled weight decay. torch.optim.Muon does the same on whole tensors only: of DTensors it
    would multiply rows as if they were matrices of their own, gathering each matrix on every rank at every product.
    Here weights, gradients and momentum stay sharded; for each matrix one rank gathers u, orthogonalises it and hands
    the pieces back, so that the ranks share the work and a step sends two messages whatever the number of matrices.

    Args:
        params: matrices, ``[rows, columns]`` each, float32: plain, or DTensors of one mesh, sharded by rows over one of
            its dimensions and replicated over the others.
        lr: the rate; singular values of a step are about as large.
        momentum: beta.
        weight_decay: share of a weight that a step of rate 1 takes away.
    """

    def __init__(
        self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._slices: dict[Tensor, list[Slice]] = {}
        self._group: dist.ProcessGroup | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"params: got a weight of shape {tuple(parameter.shape)}, expected matrices")
                if isinstance(parameter, DTensor) and not _rows_are_sharded_once(parameter):
                    raise ValueError(f"params: got a weight with {parameter.placements}, expected rows sharded once")

    def use_slices(self, slices: dict[Tensor, list[Slice]], group: dist.ProcessGroup | None) -> None:
        """From now on the parameters are these flat tensors (DeepSpeed's partitions), spread over a group of ranks."""
        self._slices, self._group = slices, group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates: list[Tensor] = []
            pieces: list[tuple[Tensor, Slice]] = []
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum, gradient = _here(state["momentum"]), _here(weight.grad)
                momentum.lerp_(gradient, 1 - beta)
                update, here = gradient.lerp(momentum, beta).flatten(), _here(weight)
                here.mul_(1 - rate * group["weight_decay"])
                for piece in self._slices_of(weight):
                    updates.append(update[piece.offset : piece.offset + piece.size])
                    pieces.append((here.view(-1)[piece.offset : piece.offset + piece.size], piece))
            exchange, rank = _group_of(weights) if not self._slices else (self._group, dist.get_rank(self._group))
            for (here, piece), update in zip(
                pieces, _orthogonalised_by_owners(updates, [p for _, p in pieces], exchange, rank), strict=True
            ):
                scale = max(1.0, piece.shape[0] / piece.shape[1]) ** 0.5
                here.add_(update, alpha=-rate * scale)
        return loss

    def _slices_of(self, weight: Tensor) -> list[Slice]:
        if self._slices:
            return self._slices[weight]
        shape, held = (weight.shape[0], weight.shape[1]), (weight.numel(),)
        if isinstance(weight, DTensor):
            world = weight.device_mesh.size(weight.placements.index(Shard(0)))
            held = tuple(rows * shape[1] for rows in _rows_by_rank(shape[0], world))
        return [Slice(shape, 0, _here(weight).numel(), held)]


def orthogonalised(x: Tensor, *, steps: int = 5) -> Tensor:
    """A matrix with x's singular vectors and singular values near 1 (0.7 to 1.2), by Newton-Schulz iteration.

    x ``[rows, columns]``; all products are with the smaller side's square. A zero matrix stays zero.
    """
    a, b, c = _QUINTIC
    tall = x.shape[0] > x.shape[1]
    y = x.mT if tall else x
    y = y / (y.norm() + 1e-12)
    for _ in range(steps):
        square = y @ y.mT
        y = torch.addmm(y, torch.addmm(square, square, square, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def _rows_are_sharded_once(x: DTensor) -> bool:
    others = [placement for placement in x.placements if placement != Shard(0)]
    return len(others) == len(x.placements) - 1 and all(placement == Replicate() for placement in others)


def _here(x: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    return x.to_local() if isinstance(x, DTensor) else x


def _group_of(weights: list[Tensor]) -> tuple[dist.ProcessGroup | None, int]:
    """The ranks that DTensors are sharded over, and which this one is; for plain tensors (None, 0)."""
    first = weights[0] if weights else None
    if not isinstance(first, DTensor):
        return None, 0
    mesh, dim = first.device_mesh, first.placements.index(Shard(0))
    return mesh.get_group(dim), mesh.get_local_rank(dim)


def _orthogonalised_by_owners(
    updates: list[Tensor], slices: list[Slice], group: dist.ProcessGroup | None, rank: int
) -> list[Tensor]:
    """This rank's numbers of each orthogonalised update, flat, from its numbers of each update."""
    if not slices:
        return []
    world = len(slices[0].held)
    if world == 1:
        return [orthogonalised(u.view(s.shape)).flatten() for u, s in zip(updates, slices, strict=True)]
    owned = _share_out([piece.shape for piece in slices], world)  # by rank: which matrices it orthogonalises
    # Numbers that `source` sends to `owner`, and gets back.
    sizes = [[sum(slices[n].held[source] for n in owned[owner]) for source in range(world)] for owner in range(world)]
    mine, theirs = sizes[rank], [by_source[rank] for by_source in sizes]
    outgoing = torch.cat([updates[n] for owner in range(world) for n in owned[owner]])
    pieces = all_to_all_parts(outgoing, theirs, mine, group).split(
        [slices[n].held[source] for source in range(world) for n in owned[rank]]
    )
    count = len(owned[rank])
    whole = [torch.cat(pieces[index::count]).view(slices[n].shape) for index, n in enumerate(owned[rank])]
    parts = [orthogonalised(x).flatten().split(slices[n].held) for x, n in zip(whole, owned[rank], strict=True)]
    answer = [part[source] for source in range(world) for part in parts]
    returned = all_to_all_parts(torch.cat(answer) if answer else outgoing[:0], mine, theirs, group)
    order = [n for owner in range(world) for n in owned[owner]]
    results = dict(zip(order, returned.split([slices[n].size for n in order]), strict=True))
    return [results[n] for n in range(len(slices))]


def _share_out(shapes: list[tuple[int, int]], world: int) -> list[list[int]]:
    """Which matrices each rank orthogonalises: the costliest first, each to the rank with the least work so far."""
    cost = [rows * columns * min(rows, columns) for rows, columns in shapes]
    owned: list[list[int]] = [[] for _ in range(world)]
    for n in sorted(range(len(shapes)), key=lambda n: (-cost[n], n)):
        min(owned, key=lambda numbers: sum(cost[m] for m in numbers)).append(n)
    return owned


def _rows_by_rank(rows: int, world: int) -> list[int]:
    """How DTensor shards rows: as torch.chunk does, so that the last ranks may have fewer or none."""
    each = -(-rows // world)
    return [max(0, min(each, rows - rank * each)) for rank in range(world)]
