"""Muon, an optimizer for the matrices inside a model, on weights that are sharded over ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from longtrain.parallel.communication import all_to_all_parts

# "Muon: An optimizer for hidden layers in neural networks" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
# the odd quintic a x + b x^3 + c x^5 whose iteration drives all singular values near 1 fastest from small ones.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each step moves a matrix along the nearest (semi-)orthogonal matrix to its momentum.

    ``m = beta m + (1 - beta) g``, ``u = beta m + (1 - beta) g`` (Nesterov), ``W -= rate * sqrt(max(1, rows/columns)) *
    orthogonal(u)``, after decoupled weight decay. torch.optim.Muon does the same on whole tensors. Here weights,
    gradients and momentum stay sharded by rows; for each matrix one rank gathers u, orthogonalises it and hands the
    rows back, so that the ranks share the work and a step sends two messages whatever the number of matrices.

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
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"params: got a weight of shape {tuple(parameter.shape)}, expected matrices")
                if isinstance(parameter, DTensor) and not _rows_are_sharded_once(parameter):
                    raise ValueError(f"params: got a weight with {parameter.placements}, expected rows sharded once")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = []
            for weight in weights:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum, gradient = _rows_here(state["momentum"]), _rows_here(weight.grad)
                momentum.lerp_(gradient, 1 - beta)
                updates.append(gradient.lerp(momentum, beta))
            for weight, update in zip(weights, _orthogonalised_by_owners(weights, updates), strict=True):
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                _rows_here(weight).mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate * scale)
        return loss


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


def _rows_here(x: Tensor) -> Tensor:
    """This rank's rows, as a view."""
    return x.to_local() if isinstance(x, DTensor) else x


def _orthogonalised_by_owners(weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """This rank's rows of each orthogonalised update, from this rank's rows of each update."""
    first = weights[0] if weights else None
    if not isinstance(first, DTensor):
        return [orthogonalised(update) for update in updates]
    mesh, dim = first.device_mesh, first.placements.index(Shard(0))
    group, rank, world = mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim)
    owned = _share_out(weights, world)  # by rank: which matrices it orthogonalises
    rows = [_rows_by_rank(weight.shape[0], world) for weight in weights]
    sizes = [
        [sum(rows[n][source] * weights[n].shape[1] for n in owned[owner]) for source in range(world)]
        for owner in range(world)
    ]  # numbers that `source` sends to `owner`, and gets back
    mine, theirs = sizes[rank], [by_source[rank] for by_source in sizes]
    outgoing = torch.cat([updates[n].flatten() for owner in range(world) for n in owned[owner]])
    pieces = all_to_all_parts(outgoing, theirs, mine, group).split(
        [rows[n][source] * weights[n].shape[1] for source in range(world) for n in owned[rank]]
    )
    count = len(owned[rank])
    whole = [torch.cat(pieces[index::count]).view(weights[n].shape) for index, n in enumerate(owned[rank])]
    parts = [orthogonalised(x).split(rows[n]) for x, n in zip(whole, owned[rank], strict=True)]
    answer = [part[source].flatten() for source in range(world) for part in parts]
    returned = all_to_all_parts(torch.cat(answer) if answer else outgoing[:0], mine, theirs, group)
    order = [n for owner in range(world) for n in owned[owner]]
    results = dict(zip(order, returned.split([updates[n].numel() for n in order]), strict=True))
    return [results[n].view(update.shape) for n, update in enumerate(updates)]


def _share_out(weights: list[Tensor], world: int) -> list[list[int]]:
    """Which matrices each rank orthogonalises: the costliest first, each to the rank with the least work so far."""
    cost = [weight.shape[0] * weight.shape[1] * min(weight.shape) for weight in weights]
    owned: list[list[int]] = [[] for _ in range(world)]
    for n in sorted(range(len(weights)), key=lambda n: (-cost[n], n)):
        min(owned, key=lambda numbers: sum(cost[m] for m in numbers)).append(n)
    return owned


def _rows_by_rank(rows: int, world: int) -> list[int]:
    """How DTensor shards rows: as torch.chunk does, so that the last ranks may have fewer or none."""
    each = -(-rows // world)
    return [max(0, min(each, rows - rank * each)) for rank in range(world)]
