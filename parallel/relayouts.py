"""The registered operators `longtrain::relayout`, `longtrain::gather` and `longtrain::gather_backward`.

As registered operators they are single steps to recompute, which may keep their results instead of sending again; see
`attention/operators.py`. The arithmetic is that of `moves`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longtrain.parallel import moves
from longtrain.parallel.agreement import agree, tensor_signature
from longtrain.parallel.shard import shard_of


@torch.library.custom_op(
    "longtrain::relayout",
    mutates_args=(),
    # tokens: those that `other` has here. parts: see `moves.relayout`.
    schema="(Tensor x, *, SymInt shard, SymInt other, int dim, SymInt tokens, SymInt[]? parts) -> Tensor",
)
def _relayout(x: Tensor, *, shard: int, other: int, dim: int, tokens: int, parts: Sequence[int] | None) -> Tensor:
    source, target = shard_of(shard), shard_of(other)
    if parts is not None:
        agree(
            source,
            {
                "operator": "attention on another layout",
                "shard": source.signature,
                "moved to": target.layout.name,
                "q, k, v": f"{tensor_signature(x)} of widths {list(parts)}",
            },
            device=x.device,
        )
    return moves.relaid(x, source, target, dim)


@_relayout.register_fake
def _relayout_shape(x: Tensor, *, shard: int, other: int, dim: int, tokens: int, parts: Any) -> Tensor:
    return x.new_empty((*x.shape[:dim], tokens, *x.shape[dim + 1 :]))


def _save_relayout(ctx: Any, inputs: tuple[Tensor], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.back = {
        "shard": keyword_only_inputs["other"],
        "other": keyword_only_inputs["shard"],
        "dim": keyword_only_inputs["dim"],
        "tokens": inputs[0].shape[keyword_only_inputs["dim"]],
    }
    if not torch.compiler.is_compiling():  # a handle keeps no shard alive
        ctx.shards = shard_of(ctx.back["shard"]), shard_of(ctx.back["other"])


def _differentiate_relayout(ctx: Any, dy: Tensor) -> Tensor:
    return _relayout(dy, **ctx.back, parts=None)


_relayout.register_autograd(_differentiate_relayout, setup_context=_save_relayout)


@torch.library.custom_op(
    "longtrain::gather", mutates_args=(), schema="(Tensor x, *, SymInt shard, int dim, SymInt whole) -> Tensor"
)
def _gather(x: Tensor, *, shard: int, dim: int, whole: int) -> Tensor:
    return moves.gathered(x, shard_of(shard), dim)


@torch.library.custom_op(
    "longtrain::gather_backward", mutates_args=(), schema="(Tensor dy, *, SymInt shard, int dim, SymInt own) -> Tensor"
)
def _gather_backward(dy: Tensor, *, shard: int, dim: int, own: int) -> Tensor:
    return moves.summed(dy, shard_of(shard), dim)


@_gather.register_fake
def _gather_shape(x: Tensor, *, shard: int, dim: int, whole: int) -> Tensor:
    return x.new_empty((*x.shape[:dim], whole, *x.shape[dim + 1 :]))


@_gather_backward.register_fake
def _gather_backward_shape(dy: Tensor, *, shard: int, dim: int, own: int) -> Tensor:
    return dy.new_empty((*dy.shape[:dim], own, *dy.shape[dim + 1 :]))


def _save_gather(ctx: Any, inputs: tuple[Tensor], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.back = {
        "shard": keyword_only_inputs["shard"],
        "dim": keyword_only_inputs["dim"],
        "own": inputs[0].shape[keyword_only_inputs["dim"]],
    }
    if not torch.compiler.is_compiling():
        ctx.shard = shard_of(ctx.back["shard"])


def _differentiate_gather(ctx: Any, dy: Tensor) -> Tensor:
    return _gather_backward(dy, **ctx.back)


_gather.register_autograd(_differentiate_gather, setup_context=_save_gather)
