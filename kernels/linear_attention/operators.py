"""The registered operators `longtrain::linear_attention` and `longtrain::linear_attention_backward`: two passes.

As registered operators they are single steps to selective checkpointing, to torch.compile and to fake tensors. They
take tensors, numbers and strings: document boundaries go in as a CPU tensor, which only the bodies read. Values are
checked in the bodies, so that a compiled program, which cannot look at them, has them checked as well.

Letters: N documents of a row; states are [B, N, H, K, V].
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.linear_attention.stages import chosen, stages
from longtrain.kernels.precision import without_autocast

NAME = "longtrain::linear_attention"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor offsets"


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # state: empty unless asked for.
    schema=f"({_INPUTS}, *, float scale, bool return_state, str backend) -> (Tensor out, Tensor state)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checks.never_positive("log_decay", log_decay)
    bounds = checks.document_offsets("cu_seqlens", offsets, tokens=v.shape[1])
    with without_autocast(q.device):
        forward = stages(chosen(backend, q, k, v)).forward(q, k, v, log_decay, bounds, scale=scale)
        out, state = forward.finish(initial_state, return_state=return_state)
    return out, out.new_empty(0) if state is None else state


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    # dlog_decay, dinitial_state: empty unless needed.
    schema=f"(Tensor dout, Tensor? dstate, {_INPUTS}, *, float scale, bool decay_gradient, bool state_gradient, "
    "str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dlog_decay, Tensor dinitial_state)",
)
def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    decay_gradient: bool,
    state_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with without_autocast(q.device):
        pass_ = stages(chosen(backend, q, k, v)).backward
        backward = pass_(q, k, v, log_decay, offsets.numpy(), dout, scale=scale)
        dq, dk, dv, dlog_decay, dinitial = backward.finish(
            initial_state, dstate, need_decay_gradient=decay_gradient, need_state_gradient=state_gradient
        )
        if dinitial is not None and initial_state is not None:
            dinitial = dinitial.to(initial_state.dtype)
    dlog_decay, dinitial = (dq.new_empty(0) if x is None else x for x in (dlog_decay, dinitial))
    return dq, dk, dv, dlog_decay, dinitial


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    state = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    out = v.new_empty(v.shape, dtype=q.dtype)
    if not return_state:
        return out, out.new_empty(0)
    return out, v.new_empty((v.shape[0], offsets.shape[0] - 1, v.shape[2], q.shape[3], v.shape[3]), dtype=state)


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    decay_gradient: bool,
    state_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed = (log_decay if decay_gradient else None, initial_state if state_gradient else None)
    dlog_decay, dinitial = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in needed)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dlog_decay, dinitial


def _save(
    ctx: Any, inputs: tuple[Tensor, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = {name: keyword_only_inputs[name] for name in ("scale", "backend")}
    ctx.has_state = keyword_only_inputs["return_state"]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, offsets = ctx.saved_tensors
    if dout is None:
        dout = v.new_zeros(v.shape, dtype=q.dtype)
    needed = ctx.needs_input_grad
    gradients = _backward(
        dout,
        dstate if ctx.has_state else None,
        q,
        k,
        v,
        log_decay,
        initial_state,
        offsets,
        **ctx.options,
        decay_gradient=log_decay is not None and needed[3],
        state_gradient=initial_state is not None and needed[4],
    )
    return *(x if wanted else None for x, wanted in zip(gradients, needed, strict=False)), None


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
