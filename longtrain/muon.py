"""Muon, an optimizer for the matrices inside a model, on weights that are sharded over ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# "Muon: An optimizer for hidden layers in neural networks" (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
# the odd quintic a x + b x^3 + c x^5 whose iteration drives all singular values near 1 fastest from small ones.
_QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each step moves a matrix along the nearest (semi-)orthogonal matrix to its momentum.

    ``m = beta m + (1 - beta) g``, ``u = beta m + (1 - beta) g`` (Nesterov), ``W -= rate * sqrt(max(1, rows/columns)) *
    orthogonal(u)``, after decoupled weight decay. torch.optim.Muon does the same on whole tensors; here weights,
    gradients and momentum stay sharded, and only u is gathered, one matrix at a time.

    Args:
        params: matrices, ``[rows, columns]`` each, plain or DTensor; float32.
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

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            beta, rate = group["momentum"], group["lr"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - beta)
                update = orthogonalised(_whole(weight.grad.lerp(momentum, beta)))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - rate * group["weight_decay"])
                weight.add_(_sharded_like(weight, update), alpha=-rate * scale)
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


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def _sharded_like(weight: Tensor, x: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return x
    # Every rank has the same x, so each takes its part without a message.
    return distribute_tensor(x, weight.device_mesh, weight.placements, src_data_rank=None)
