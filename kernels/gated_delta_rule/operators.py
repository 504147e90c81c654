"""The registered operators `longtrain::gated_delta_rule` and `longtrain::gated_delta_rule_backward`.

As registered operators the two are single steps to selective checkpointing, to torch.compile and to fake tensors. The
boundaries of documents go in as a tensor on the CPU, so that new documents in every batch compile nothing anew; what
they say is checked in the body, which always runs on real tensors.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.gated_delta_rule import torch_impl
from longtrain.kernels.precision import without_autocast

NAME = "longtrain::gated_delta_rule"
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor offsets"


def implementation(backend: str) -> ModuleType:
    """The module whose DeltaRuleForward and DeltaRuleBackward are those of a backend, "torch" or "triton"."""
    if backend == "triton":  # imports Triton, which not every machine has
        from longtrain.kernels.gated_delta_rule import triton_impl

        return triton_impl
    return torch_impl


def chosen(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that runs a call, see `choose_backend`."""
    widths = {"K": q.shape[3], "V": v.shape[3]}
    return choose_backend("gated_delta_rule", backend, device=q.device, dtype=_state_dtype(q, k, v), widths=widths)


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # offsets [N+1]: boundaries of every row's segments, on the CPU. initial_state, state: [B, N, H, K, V]; a state
    # that is not to be returned has no elements.
    schema=f"({_INPUTS}, *, float scale, bool return_state, str backend) -> (Tensor out, Tensor state)",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    backend = chosen(backend, q, k, v)  # a compiled caller hands on what it was asked for
    checks.never_positive("log_decay", log_decay)
    bounds = checks.document_offsets("cu_seqlens", offsets, tokens=q.shape[1])
    with without_autocast(q.device):
        forward = implementation(backend).DeltaRuleForward(q, k, v, beta, log_decay, bounds, scale=scale)
        out, state = forward.finish(initial_state, return_state=return_state)
    return out, v.new_empty(0, dtype=_state_dtype(q, k, v)) if state is None else state


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    # A gradient that is not needed has no elements.
    schema=f"(Tensor dout, Tensor? dstate, {_INPUTS}, *, float scale, str backend, bool need_decay, bool need_state) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbeta, Tensor dlog_decay, Tensor dinitial_state)",
)
def _backward(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    backend: str,
    need_decay: bool,
    need_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, bounds = chosen(backend, q, k, v), offsets.numpy()
    with without_autocast(q.device):
        backward = implementation(backend).DeltaRuleBackward(q, k, v, beta, log_decay, bounds, dout, scale=scale)
        *gradients, dlog_decay, dinitial = backward.finish(
            initial_state, dstate, need_decay_gradient=need_decay, need_state_gradient=need_state
        )
    dlog_decay = v.new_empty(0) if dlog_decay is None else dlog_decay
    dinitial = v.new_empty(0) if dinitial is None or initial_state is None else dinitial.to(initial_state.dtype)
    return (*gradients, dlog_decay, dinitial)


def _state_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32


@_forward.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    return_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], offsets.shape[0] - 1, v.shape[2], q.shape[3], v.shape[3]) if return_state else (0,)
    return v.new_empty(v.shape, dtype=q.dtype), v.new_empty(shape, dtype=_state_dtype(q, k, v))


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    offsets: Tensor,
    *,
    scale: float,
    backend: str,
    need_decay: bool,
    need_state: bool,
) -> tuple[Tensor, ...]:
    dlog_decay = v.new_empty(0) if log_decay is None or not need_decay else log_decay.new_empty(log_decay.shape)
    dinitial = (
        v.new_empty(0) if initial_state is None or not need_state else initial_state.new_empty(initial_state.shape)
    )
    return (*(x.new_empty(x.shape) for x in (q, k, v, beta)), dlog_decay, dinitial)


def _save(
    ctx: Any, inputs: tuple[Tensor | None, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]
) -> None:
    ctx.save_for_backward(*inputs)
    ctx.scale, ctx.backend = keyword_only_inputs["scale"], keyword_only_inputs["backend"]
    ctx.returned_state = keyword_only_inputs["return_state"]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, beta, log_decay, initial_state, offsets = ctx.saved_tensors
    dout = torch.zeros_like(v, dtype=q.dtype) if dout is None else dout
    needed = ctx.needs_input_grad
    gradients = _backward(
        dout,
        dstate if ctx.returned_state else None,
        q,
        k,
        v,
        beta,
        log_decay,
        initial_state,
        offsets,
        scale=ctx.scale,
        backend=ctx.backend,
        need_decay=needed[4],
        need_state=needed[5],
    )
    return (*(x if need else None for x, need in zip(gradients, needed, strict=False)), None)


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
