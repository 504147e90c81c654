"""The registered operator `longtrain::rotary`, a single step to recompute and dry runs; it is its own backward."""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.kernels.rotary import torch_impl

NAME = "longtrain::rotary"


@torch.library.custom_op(
    NAME, mutates_args=(), schema="(Tensor x, Tensor positions, *, float base, bool inverse) -> Tensor"
)
def _forward(x: Tensor, positions: Tensor, *, base: float, inverse: bool) -> Tensor:
    with without_autocast(x.device):
        return torch_impl.rotate(x, positions, base=base, inverse=inverse)


@_forward.register_fake
def _shapes(x: Tensor, positions: Tensor, *, base: float, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.options = keyword_only_inputs


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    (positions,) = ctx.saved_tensors
    return _forward(dy, positions, base=ctx.options["base"], inverse=not ctx.options["inverse"]), None


_forward.register_autograd(_differentiate, setup_context=_save)
forward = _forward
