"""The registered operators `longtrain::linear_cross_entropy` and `..._backward`: a loss for each token, its gradients.

To selective checkpointing, torch.compile and fake tensors each is a single step. They take flat tokens; what is made
of the losses (a sum, a mean) is left to PyTorch, so that any gradient of them is right.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain import debug
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.linear_cross_entropy import torch_impl
from longtrain.kernels.linear_cross_entropy.loop import Options
from longtrain.kernels.precision import without_autocast

NAME = "longtrain::linear_cross_entropy"
_OPTIONS = "int ignore_index, float z_loss, float? softcap, str backend"


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor targets, *, {_OPTIONS}) -> (Tensor losses, Tensor lse)",
)
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    check_targets(targets, weight.shape[0], ignore_index=options["ignore_index"])
    with without_autocast(hidden.device):
        return _implementation(hidden, weight, backend).forward(hidden, weight, targets, Options(**options))


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema="(Tensor dlosses, Tensor hidden, Tensor weight, Tensor targets, Tensor lse, *, "
    f"{_OPTIONS}, bool need_hidden, bool need_weight) -> (Tensor dhidden, Tensor dweight)",
)
def _backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    backend: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """What is not needed comes back empty."""
    with without_autocast(hidden.device):
        dhidden, dweight = _implementation(hidden, weight, backend).backward(
            dlosses,
            hidden,
            weight,
            targets,
            lse,
            Options(**options),
            need_hidden=need_hidden,
            need_weight=need_weight,
        )
    return hidden.new_empty(0) if dhidden is None else dhidden, weight.new_empty(0) if dweight is None else dweight


def _implementation(hidden: Tensor, weight: Tensor, backend: str) -> Any:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if choose_backend("linear_cross_entropy", backend, device=hidden.device, dtype=dtype) == "triton":
        from longtrain.kernels.linear_cross_entropy import triton_impl

        return triton_impl
    return torch_impl


def check_targets(targets: Tensor, vocabulary: int, *, ignore_index: int) -> None:
    """Refuse targets that are neither a token of the vocabulary nor ignored, where to look makes no device wait."""
    if targets.device.type != "cpu" and not debug.enabled():
        return
    wrong = ((targets < 0) | (targets >= vocabulary)) & (targets != ignore_index)
    if wrong.any():
        raise ValueError(
            f"targets: got {int(targets[wrong][0])}, expected 0 to {vocabulary - 1} or ignore_index {ignore_index}"
        )


@_forward.register_fake
def _forward_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    losses = hidden.new_empty(targets.shape, dtype=wide)
    return losses, torch.empty_like(losses)


@_backward.register_fake
def _backward_shapes(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    *,
    need_hidden: bool,
    need_weight: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    return dhidden, weight.new_empty(weight.shape if need_weight else 0)


def _save(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    losses, lse = output
    ctx.save_for_backward(*inputs, lse)
    ctx.mark_non_differentiable(lse)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dlosses: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dlosses is None:
        return None, None, None
    need_hidden, need_weight, _needed = ctx.needs_input_grad
    dhidden, dweight = _backward(
        dlosses, *ctx.saved_tensors, **ctx.options, need_hidden=need_hidden, need_weight=need_weight
    )
    return dhidden if need_hidden else None, dweight if need_weight else None, None


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
