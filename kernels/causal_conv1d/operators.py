"""The registered operators `longtrain::causal_conv1d` and `..._backward`.

Tensors of boundaries and counts are on the CPU. offsets None: each row is one segment. The halo and its counts are
those of `passes.convolve_forward`; ranks call the operator with them, so that dry runs and recompute see it.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.causal_conv1d.passes import convolve_backward, convolve_forward

NAME = "longtrain::causal_conv1d"
_INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? halo, Tensor? offsets, Tensor? halo_counts"
_OPTIONS = "*, str? activation, str backend"


@torch.library.custom_op(NAME, mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> Tensor")
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    offsets: Tensor | None,
    halo_counts: Tensor | None,
    *,
    activation: str | None,
    backend: str,
) -> Tensor:
    bounds, counts = _host(x, weight, halo, offsets, halo_counts)
    return convolve_forward(
        x, weight, bias, bounds, halo=halo, halo_counts=counts, activation=activation, backend=backend
    )


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    # dbias and dhalo are empty [0] where there is no bias or no halo: an operator cannot return None.
    schema=f"(Tensor dout, {_INPUTS}, {_OPTIONS}) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dhalo)",
)
def _backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    offsets: Tensor | None,
    halo_counts: Tensor | None,
    *,
    activation: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds, counts = _host(x, weight, halo, offsets, halo_counts)
    dx, dweight, dbias, dhalo = convolve_backward(
        dout, x, weight, bias, bounds, halo=halo, halo_counts=counts, activation=activation, backend=backend
    )
    dbias, dhalo = (x.new_empty(0) if y is None else y for y in (dbias, dhalo))
    return dx, dweight, dbias, dhalo


def _host(
    x: Tensor, weight: Tensor, halo: Tensor | None, offsets: Tensor | None, halo_counts: Tensor | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """The boundaries and counts, checked, for one row: all rows of a batch share them."""
    bounds = checks.document_offsets("cu_seqlens", offsets, tokens=x.shape[1])
    if halo is not None:
        expected = (x.shape[0], bounds.size - 1, weight.shape[1] - 1, x.shape[2])
        checks.sizes("halo", halo, expected, "[B, N, width - 1, D]")
    if halo_counts is None:
        return bounds, None
    checks.sizes("halo_counts", halo_counts, (bounds.size - 1,), "[N]")
    return bounds, halo_counts.numpy().astype(np.int64)


@_forward.register_fake
def _forward_shapes(x: Tensor, *inputs: Tensor | None, **options: Any) -> Tensor:
    return x.new_empty(x.shape)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    halo: Tensor | None,
    offsets: Tensor | None,
    halo_counts: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias, dhalo = (x.new_empty(0) if y is None else y.new_empty(y.shape) for y in (bias, halo))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dhalo


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    inputs = ctx.saved_tensors
    gradients = (*_backward(dout, *inputs, **ctx.options), None, None)
    given = zip(gradients, inputs, ctx.needs_input_grad, strict=True)
    return tuple(y if needed and x is not None else None for y, x, needed in given)


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
