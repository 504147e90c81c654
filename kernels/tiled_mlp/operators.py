"""The registered operators `longtrain::tiled_mlp` and `..._backward`: single steps to recompute and dry runs.

The weights are inputs of one operator, whatever the number of tiles: autograd gives each of them one gradient.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.kernels.tiled_mlp import torch_impl

NAME = "longtrain::tiled_mlp"
_INPUTS = "Tensor x, Tensor norm, Tensor gate_up, Tensor down, *, float eps, int tile"


@torch.library.custom_op(NAME, mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _forward(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, eps: float, tile: int) -> Tensor:
    with without_autocast(x.device):
        return torch_impl.forward(_flat(x), norm, gate_up, down, eps=eps, tile=tile).view(x.shape)


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor dx, Tensor dnorm, Tensor dgate_up, Tensor ddown)",
)
def _backward(
    dy: Tensor, x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, *, eps: float, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(x.device):
        dx, *dweights = torch_impl.backward(_flat(dy), _flat(x), norm, gate_up, down, eps=eps, tile=tile)
    return dx.view(x.shape), *dweights  # type: ignore[return-value]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


@_forward.register_fake
def _forward_shapes(x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _backward_shapes(dy: Tensor, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward(dy, *ctx.saved_tensors, **ctx.options)
    return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=True))


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
