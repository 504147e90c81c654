"""The registered operators `longtrain::pamm_linear` and `..._backward`: forward returns what backward needs, too."""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import launching

NAME = "longtrain::pamm_linear"
CHUNK = 4096  # tokens that are compared with the kept rows at a time: the likenesses of all would be N k numbers


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.custom_op(
    NAME, mutates_args=(), schema="(Tensor x, Tensor weight, Tensor rows) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _forward(x: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [..., O]; the kept rows [k, D]; of each token an index int32 [N] and a scale [N]."""
    tokens = x.reshape(-1, x.shape[-1])
    kept = tokens[rows] if tokens.shape[0] else tokens.new_zeros(rows.shape[0], tokens.shape[1])
    wide = kept.to(_wide(x))
    square = (wide * wide).sum(1)
    inverse = torch.where(square > 0, square.rsqrt(), 0)  # a row of zeros is like nothing
    index = torch.empty(tokens.shape[0], dtype=torch.int32, device=x.device)
    scale = torch.empty(tokens.shape[0], dtype=wide.dtype, device=x.device)
    for part in launching.tiles(tokens.shape[0], CHUNK, tokens.device):
        likeness = (tokens[part].to(wide.dtype) @ wide.t()) * inverse
        chosen = likeness.abs().argmax(1)
        index[part] = chosen.to(torch.int32)
        scale[part] = likeness.gather(1, chosen[:, None]).squeeze(1) * inverse[chosen]
    return torch.nn.functional.linear(x, weight), kept, index, scale


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor weight, Tensor kept, Tensor index, Tensor scale) -> (Tensor, Tensor)",
)
def _backward(dy: Tensor, weight: Tensor, kept: Tensor, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """dx [..., D] and dweight [O, D]."""
    flat = dy.reshape(-1, dy.shape[-1])
    by_row = torch.zeros(kept.shape[0], flat.shape[1], dtype=scale.dtype, device=dy.device)
    for part in launching.tiles(flat.shape[0], CHUNK, flat.device):
        by_row.index_add_(0, index[part].long(), flat[part].to(scale.dtype) * scale[part, None])
    return dy @ weight, (by_row.t() @ kept.to(scale.dtype)).to(weight.dtype)


@_forward.register_fake
def _forward_shapes(x: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = x.numel() // x.shape[-1]
    index, scale = x.new_empty(count, dtype=torch.int32), x.new_empty(count, dtype=_wide(x))
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(rows.shape[0], x.shape[-1]), index, scale


@_backward.register_fake
def _backward_shapes(dy: Tensor, weight: Tensor, kept: Tensor, index: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty((*dy.shape[:-1], weight.shape[1])), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, kept, index, scale = output
    ctx.save_for_backward(inputs[1], kept, index, scale)
    ctx.mark_non_differentiable(kept, index, scale)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    found = _backward(dy, *ctx.saved_tensors)
    return *(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=False)), None


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
