"""The registered operators `longtrain::swiglu` and `..._backward`: single steps to recompute and dry runs."""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.swiglu import torch_impl

NAME = "longtrain::swiglu"


@torch.library.custom_op(NAME, mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def _forward(gate_up: Tensor) -> Tensor:
    return torch_impl.forward(gate_up)


@torch.library.custom_op(f"{NAME}_backward", mutates_args=(), schema="(Tensor dy, Tensor gate_up) -> Tensor")
def _backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    return torch_impl.backward(dy, gate_up)


@_forward.register_fake
def _forward_shapes(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@_backward.register_fake
def _backward_shapes(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    return _backward(dy, gate_up)


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
