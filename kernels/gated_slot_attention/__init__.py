"""Gated slot attention on one device: the public operator, and the staged passes that scans over ranks call too."""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.gated_slot_attention import operators, reference
from longtrain.kernels.gated_slot_attention.passes import SlotAttentionBackward, SlotAttentionForward
from longtrain.kernels.gated_slot_attention.torch_impl import compute_dtype
from longtrain.kernels.precision import without_autocast

__all__ = ["SlotAttentionBackward", "SlotAttentionForward", "check_inputs", "gated_slot_attention"]


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | np.ndarray | None = None,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Softmax attention over M slots that tokens are written into and that decay: constant time and memory per token.

        A_t = A_{t-1} diag(exp(log_decay_t)) + k_t slot_t^T,  C_t = diag(exp(log_decay_t)) C_{t-1} + slot_t v_t^T
        o_t = softmax(scale * q_t A_t) C_t

    ("Gated Slot Attention for Efficient Linear-Time Sequence Modeling", Zhang et al. 2024, equations 7 to 9, where
    slot_t is 1 - exp(log_decay_t).)

    q, k [B, T, G, K] with G a divisor of H, v [B, T, H, V], slot, log_decay [B, T, H, M] -> out [B, T, H, V] in q's
    dtype, and the state or None. Dtypes may differ; where q, k, v or slot is float64 all is computed in float64,
    otherwise in float32. Everything is differentiable, the state too; a gradient has its tensor's dtype.

    log_decay: never above 0. -inf empties a slot before the token is written.
    scale: multiplies q; default K ** -0.5.
    initial_state: A [N, H, K, M] and C [N, H, M, V] before the first tokens (N documents; without cu_seqlens B).
    return_state: also return A and C after the last tokens, alike, in float32 (float64 where that is computed in). An
        empty document passes its initial state through.
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        each document starts anew. Best kept on the CPU: elsewhere the host waits to read it.
    backend: "auto", "triton" (K, V and M up to 256), "torch" or "reference"; `kernels.explain` tells what runs.

    A NaN or inf reaches what depends on it and nothing else: no other document, row or head, no output before it, and
    no gradient that it has no part in. With the Triton kernels the gradient of log_decay is the exception that it is in
    `linear_attention`: slots count there as k and v do.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, backends, and
    log-decays above 0 (on a GPU, where the check would wait for the device, only under `longtrain.debug.checks()`).
    """
    check_inputs(q, k, v, slot, log_decay)
    checks.true_or_false("return_state", return_state)
    factor = scale if torch.compiler.is_compiling() else checks.number("scale", scale)  # there it may be a symbol
    factor = q.shape[3] ** -0.5 if factor is None else factor
    batch, tokens = v.shape[:2]
    packed = cu_seqlens is not None
    offsets = None
    if torch.compiler.is_compiling():  # values cannot be looked at: the operator does it when it runs
        offsets = torch.as_tensor(cu_seqlens).cpu() if packed else None
    else:
        widths = {"K": q.shape[3], "V": v.shape[3], "M": slot.shape[3]}
        dtype = compute_dtype(q, k, v, slot)
        choose_backend("gated_slot_attention", backend, device=q.device, dtype=dtype, widths=widths)
        if packed:
            offsets = torch.from_numpy(checks.document_offsets("cu_seqlens", cu_seqlens, tokens=tokens, batch=batch))
    rows = batch if offsets is None else offsets.shape[0] - 1
    states = _check_state(initial_state, q, v, slot, rows, letter="N" if packed else "B")
    keys, values = (None, None) if states is None else (x[None] if packed else x[:, None] for x in states)
    if backend == "reference":
        checks.never_positive("log_decay", log_decay)
        bounds = checks.document_offsets("cu_seqlens", offsets, tokens=tokens)
        initial = None if keys is None or values is None else (keys, values)
        with without_autocast(q.device):
            out, (keys, values) = reference.gated_slot_attention(
                q, k, v, slot, log_decay, bounds, scale=factor, initial_state=initial
            )
        out = out.to(q.dtype)
    else:
        out, _, keys, values = operators.forward(
            *(q, k, v, slot, log_decay, keys, values, offsets),
            scale=factor,
            return_state=return_state,
            backend=backend,
        )
    if not return_state:
        return out, None
    return out, (keys[0], values[0]) if packed else (keys[:, 0], values[:, 0])


def check_inputs(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, log_decay: Tensor) -> None:
    """Refuse, with a ValueError naming the argument, tensors that gated slot attention cannot take: see there."""
    checks.linear_inputs(q, k, v)
    batch, tokens, heads, _ = v.shape
    checks.floating("slot", slot, "[B, T, H, M]")
    checks.floating("log_decay", log_decay, "[B, T, H, M]")
    checks.sizes("slot", slot, (batch, tokens, heads, None), "[B, T, H, M], with v's B, T and H,")
    checks.sizes("log_decay", log_decay, tuple(slot.shape), "[B, T, H, M], as slot,")
    checks.same_device(q=q, k=k, v=v, slot=slot, log_decay=log_decay)


def _check_state(
    state: object, q: Tensor, v: Tensor, slot: Tensor, rows: int, *, letter: str
) -> tuple[Tensor, Tensor] | None:
    if state is None:
        return None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise ValueError(f"initial_state: got {type(state).__name__}, expected a pair of tensors (A, C) or None")
    heads, slots = v.shape[2], slot.shape[3]
    keys, values = state
    sizes = ((rows, heads, q.shape[3], slots), (rows, heads, slots, v.shape[3]))
    for n, (x, size, widths) in enumerate(zip((keys, values), sizes, ("K, M", "M, V"), strict=True)):
        checks.floating(f"initial_state[{n}]", x, f"[{letter}, H, {widths}]")
        checks.sizes(f"initial_state[{n}]", x, size, f"[{letter}, H, {widths}]")
    checks.same_device(q=q, initial_state=keys)
    checks.same_device(q=q, initial_state=values)
    return keys, values
