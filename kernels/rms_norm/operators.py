"""The registered operators `longtrain::rms_norm` and `..._backward`: single steps to recompute and dry runs."""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.kernels.rms_norm import torch_impl

NAME = "longtrain::rms_norm"


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # r: 1 / sqrt(mean(x^2) + eps) of each token, for backward.
    schema="(Tensor x, Tensor? weight, *, float eps) -> (Tensor y, Tensor r)",
)
def _forward(x: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    with without_autocast(x.device):
        y, r = torch_impl.forward(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps=eps)
    return y.view(x.shape), r.view(x.shape[:-1])


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    # dweight is empty [0] where there is no weight: an operator cannot return None.
    schema="(Tensor dy, Tensor x, Tensor? weight, Tensor r) -> (Tensor dx, Tensor dweight)",
)
def _backward(dy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    given, flat = (y.reshape(-1, x.shape[-1]).contiguous() for y in (dy, x))
    with without_autocast(x.device):
        dx, dweight = torch_impl.backward(given, flat, weight, r.reshape(-1))
    return dx.view(x.shape), x.new_empty(0) if dweight is None else dweight


@_forward.register_fake
def _forward_shapes(x: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch_impl.state_dtype(x, weight))


@_backward.register_fake
def _backward_shapes(dy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor | None], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if dy is None:
        return None, None
    x, weight, r = ctx.saved_tensors
    dx, dweight = _backward(dy, x, weight, r)
    need_x, need_weight = ctx.needs_input_grad
    return dx if need_x else None, dweight if need_weight and weight is not None else None


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
