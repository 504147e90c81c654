"""Cross-entropy of a linear head by tiles with PyTorch's operators; see `loop`, which calls these `Steps`."""

import torch
from torch import Tensor

from longtrain.kernels.linear_cross_entropy import loop
from longtrain.kernels.linear_cross_entropy.loop import Options

# Tokens and vocabulary of a tile: on a CPU one that stays in its caches, on a GPU one that costs it few launches.
_CPU_TILE, _GPU_TILE = (1024, 1024), (4096, 8192)


class TorchSteps:
    """`loop.Steps`."""

    def sum_up(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        maximum: Tensor,
        total: Tensor,
        own: Tensor,
    ) -> None:
        if softcap is not None:
            logits.div_(softcap).tanh_().mul_(softcap)
        here, column = _columns(targets, first, logits.shape[1])
        own.copy_(torch.where(here, logits.gather(1, column)[:, 0], own))
        largest = torch.maximum(maximum, logits.amax(1))
        shift = torch.where(largest.isinf(), 0, largest)  # inf - inf is no number
        total.mul_((maximum - shift).exp_()).add_(logits.sub_(shift[:, None]).exp_().sum(1))
        maximum.copy_(largest)

    def differentiate(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        lse: Tensor,
        scale: Tensor,
        dlosses: Tensor,
        out: Tensor,
    ) -> None:
        slope = None
        if softcap is not None:
            logits.div_(softcap).tanh_()
            slope = 1 - logits.square()
            logits.mul_(softcap)
        logits.sub_(lse[:, None]).exp_().mul_(scale[:, None])
        here, column = _columns(targets, first, logits.shape[1])
        logits.scatter_(1, column, logits.gather(1, column) - torch.where(here, dlosses, 0)[:, None])
        if slope is not None:
            logits.mul_(slope)
        if out.dtype != logits.dtype:
            out.copy_(logits)


def _columns(targets: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each target is among a tile's columns, [n], and which one it is (any where it is not), [n, 1]."""
    column = targets - first
    return (column >= 0) & (column < width), column.clamp(0, width - 1)[:, None]


def forward(hidden: Tensor, weight: Tensor, targets: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """As `loop.forward`."""
    return loop.forward(hidden, weight, targets, options, TorchSteps(), _sizes(hidden))


def backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    options: Options,
    *,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """As `loop.backward`."""
    return loop.backward(
        dlosses,
        hidden,
        weight,
        targets,
        lse,
        options,
        TorchSteps(),
        _sizes(hidden),
        need_hidden=need_hidden,
        need_weight=need_weight,
    )


def _sizes(hidden: Tensor) -> tuple[int, int]:
    return _CPU_TILE if hidden.device.type == "cpu" else _GPU_TILE
