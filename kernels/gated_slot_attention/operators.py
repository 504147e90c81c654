"""The registered operators `longtrain::gated_slot_attention` and `..._backward`.

Boundaries are on the CPU; offsets None: each row is one segment. States are [B, N, H, ...]; where they are not given or
not asked for, operators return empty ones [0], since they cannot return None.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.gated_slot_attention.passes import SlotAttentionBackward, SlotAttentionForward
from longtrain.kernels.gated_slot_attention.torch_impl import compute_dtype
from longtrain.kernels.precision import without_autocast

NAME = "longtrain::gated_slot_attention"
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor slot, Tensor log_decay, Tensor? initial_keys, Tensor? initial_values, "
    "Tensor? offsets"
)


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    schema=f"({_INPUTS}, *, float scale, bool return_state, str backend) "
    "-> (Tensor out, Tensor weights, Tensor keys, Tensor values)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    initial_keys: Tensor | None,
    initial_values: Tensor | None,
    offsets: Tensor | None,
    *,
    scale: float,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounds = _bounds(q, offsets)
    checks.never_positive("log_decay", log_decay)
    initial = None if initial_keys is None or initial_values is None else (initial_keys, initial_values)
    chosen = _backend(q, k, v, slot, backend)
    with without_autocast(q.device):
        forward = SlotAttentionForward(q, k, v, slot, log_decay, bounds, scale=scale, backend=chosen)
        out, weights, states = forward.finish(initial, return_state=return_state)
    keys, values = (weights.new_empty(0), weights.new_empty(0)) if states is None else states
    return out, weights, keys, values


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dkeys, Tensor? dvalues, Tensor weights, {_INPUTS}, *, float scale, str backend) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dslot, Tensor dlog_decay, Tensor dkeys, Tensor dvalues)",
)
def _backward(
    dout: Tensor,
    dkeys: Tensor | None,
    dvalues: Tensor | None,
    weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    initial_keys: Tensor | None,
    initial_values: Tensor | None,
    offsets: Tensor | None,
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, ...]:
    bounds = _bounds(q, offsets)
    chosen = _backend(q, k, v, slot, backend)
    with without_autocast(q.device):
        backward = SlotAttentionBackward(q, k, v, slot, log_decay, weights, bounds, dout, scale=scale, backend=chosen)
        dinitial_values = backward.finish_values(initial_values, dvalues)
        *gradients, dinitial_keys = backward.finish(initial_keys, dkeys)
    if initial_keys is None or initial_values is None:
        return *gradients, weights.new_empty(0), weights.new_empty(0)
    return *gradients, dinitial_keys.to(initial_keys.dtype), dinitial_values.to(initial_values.dtype)


def _bounds(q: Tensor, offsets: Tensor | None) -> np.ndarray:
    return checks.document_offsets("cu_seqlens", offsets, tokens=q.shape[1])


def _backend(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, requested: str) -> str:
    widths = {"K": q.shape[3], "V": v.shape[3], "M": slot.shape[3]}
    dtype = compute_dtype(q, k, v, slot)
    return choose_backend("gated_slot_attention", requested, device=q.device, dtype=dtype, widths=widths)


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    initial_keys: Tensor | None,
    initial_values: Tensor | None,
    offsets: Tensor | None,
    *,
    return_state: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q, k, v, slot)
    out, weights = v.new_empty(v.shape, dtype=q.dtype), slot.new_empty(slot.shape, dtype=dtype)
    if not return_state:
        return out, weights, weights.new_empty(0), weights.new_empty(0)
    rows, _, heads, slots = slot.shape
    segments = 1 if offsets is None else offsets.shape[0] - 1
    keys = weights.new_empty((rows, segments, heads, q.shape[3], slots))
    return out, weights, keys, weights.new_empty((rows, segments, heads, slots, v.shape[3]))


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    dkeys: Tensor | None,
    dvalues: Tensor | None,
    weights: Tensor,
    *inputs: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    gradients = [weights.new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs[:7]]
    return tuple(gradients)


def _save(
    ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    ctx.save_for_backward(output[1], *inputs)
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "backend")}
    ctx.has_state = keyword_only_inputs["return_state"]
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, dout: Tensor | None, dweights: Tensor | None, dkeys: Tensor | None, dvalues: Tensor | None
) -> tuple[Tensor | None, ...]:
    weights, *inputs = ctx.saved_tensors
    if not ctx.has_state:
        dkeys = dvalues = None
    if dout is None:
        if dkeys is None and dvalues is None:
            return (None,) * 8
        dout = torch.zeros_like(inputs[2])
    gradients = (*_backward(dout, dkeys, dvalues, weights, *inputs, **ctx.options), None)
    given = zip(gradients, inputs, ctx.needs_input_grad, strict=True)
    return tuple(x if needed and given is not None else None for x, given, needed in given)


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
