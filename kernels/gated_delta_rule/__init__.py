"""The gated delta rule on one device: the public operator, and the staged passes that scans over ranks call too."""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.gated_delta_rule import operators, reference
from longtrain.kernels.precision import without_autocast

__all__ = ["check_inputs", "gated_delta_rule", "stages"]


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | np.ndarray | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """A recurrence that stores a value under a key by replacing what was stored there: fixed state, constant time.

        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,  o_t = scale * q_t S_t

    ("Gated Delta Networks: Improving Mamba2 with Delta Rule", Yang et al. 2024, equation 10; without decays the delta
    rule of "Linear Transformers Are Secretly Fast Weight Programmers", Schlag et al. 2021; with decays per channel
    "Kimi Linear", 2025, equation 1.) Keys are taken as they are: normalise them before, if that is wanted. With
    beta_t |k_t|^2 outside of [0, 2] states may grow from token to token.

    q, k [B, T, G, K] with G a divisor of H, v [B, T, H, V], beta [B, T, H] of any sign -> out [B, T, H, V] in q's
    dtype, and the state or None. Dtypes may differ; where q, k or v is float64 all is computed in float64, otherwise
    in float32 (the Triton kernels multiply matrices in the dtype of q, k and v, where these are alike, and add up in
    float32). Everything is differentiable, once, the state too; a gradient has its tensor's dtype.

    log_decay: never above 0; None (no decay), [B, T, H] (per token) or [B, T, H, K] (per channel). -inf forgets all
        that came before.
    scale: multiplies q; default K ** -0.5.
    initial_state: [N, H, K, V] (N documents; without cu_seqlens [B, H, K, V]), the states before the first tokens.
    return_state: also return the states after the last tokens, alike, in float32 (float64 where that is computed in).
        An empty document passes its initial state through.
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        each document starts anew. Best kept on the CPU: elsewhere the host waits to read it.
    backend: "auto", "triton", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    A NaN or inf reaches what depends on it and nothing else: no other document, row or head, no output before it, and
    no gradient that it has no part in but, at its own token, those of v, beta and log_decay.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, backends, and
    log-decays above 0 (on a GPU, where the check would wait for the device, only under `longtrain.debug.checks()`).
    """
    check_inputs(q, k, v, beta, log_decay)
    batch, tokens, heads, value_width = v.shape
    if not torch.compiler.is_compiling():  # then the operator chooses, when it runs
        backend = operators.chosen(backend, q, k, v)
    checks.true_or_false("return_state", return_state)
    factor = checks.number("scale", scale)
    factor = q.shape[3] ** -0.5 if factor is None else factor
    offsets = checks.operator_offsets(cu_seqlens, tokens=tokens, batch=batch)
    packed = cu_seqlens is not None
    if initial_state is not None:
        meaning = "[N, H, K, V]" if packed else "[B, H, K, V]"
        checks.floating("initial_state", initial_state, meaning)
        count = offsets.shape[0] - 1 if packed else batch
        checks.sizes("initial_state", initial_state, (count, heads, q.shape[3], value_width), meaning)
        checks.same_device(q=q, initial_state=initial_state)
        initial_state = initial_state[None] if packed else initial_state[:, None]  # [B, N, H, K, V]
    if backend == "reference":
        checks.never_positive("log_decay", log_decay)
        with without_autocast(q.device):
            out, state = reference.gated_delta_rule(
                q, k, v, beta, log_decay, offsets.numpy(), scale=factor, initial_state=initial_state
            )
        out = out.to(q.dtype)
    else:
        out, state = operators.forward(
            q, k, v, beta, log_decay, initial_state, offsets, scale=factor, return_state=return_state, backend=backend
        )
    return out, state.squeeze(0 if packed else 1) if return_state else None


def stages(backend: str):
    """The classes (DeltaRuleForward, DeltaRuleBackward) of a backend, "torch" or "triton", for scans over ranks."""
    module = operators.implementation(backend)
    return module.DeltaRuleForward, module.DeltaRuleBackward


def check_inputs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    """Refuse, with a ValueError naming the argument, tensors that the gated delta rule cannot take: see there."""
    checks.linear_inputs(q, k, v)
    checks.floating("beta", beta, "[B, T, H]")
    checks.sizes("beta", beta, tuple(v.shape[:3]), "[B, T, H]")
    checks.optional_log_decay(log_decay, q, v, meanings="[B, T, H] or [B, T, H, K]")
    checks.same_device(q=q, k=k, v=v, beta=beta, log_decay=log_decay)
