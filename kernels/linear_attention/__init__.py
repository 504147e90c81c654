"""Linear attention on one device: the public operator, and the staged passes that scans over ranks call too."""

import numpy as np
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.linear_attention import operators, reference
from longtrain.kernels.linear_attention.stages import chosen, stages
from longtrain.kernels.linear_attention.torch_impl import LinearAttentionBackward, LinearAttentionForward
from longtrain.kernels.precision import without_autocast

__all__ = [
    "LinearAttentionBackward",
    "LinearAttentionForward",
    "check_inputs",
    "chosen",
    "linear_attention",
    "stages",
]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | np.ndarray | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention without a softmax, as a recurrence: constant time per token, a state of fixed size.

        S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  o_t = scale * q_t S_t

    ("Transformers are RNNs", Katharopoulos et al. 2020, equations 18 to 20, without their normaliser; with decays per
    channel "Gated Linear Attention Transformers with Hardware-Efficient Training", Yang et al. 2024, equation 3.)

    q, k [B, T, G, K] with G a divisor of H, v [B, T, H, V] -> out [B, T, H, V] in q's dtype, and the state or None.
    Dtypes may differ; where q, k or v is float64 all is computed in float64, otherwise in float32. Everything is
    differentiable, the state too; a gradient has its tensor's dtype.

    log_decay: never above 0; None (no decay), [H] (fixed per head), [B, T, H] (per token) or [B, T, H, K] (per
        channel). -inf forgets all that came before.
    scale: multiplies q; default K ** -0.5.
    initial_state: [N, H, K, V] (N documents; without cu_seqlens [B, H, K, V]), the states before the first tokens.
    return_state: also return the states after the last tokens, alike, in float32 (float64 where that is computed in).
        An empty document passes its initial state through.
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        each document starts anew. Best kept on the CPU: elsewhere the host waits to read it.
    backend: "auto", "triton" (on a GPU; K and V up to 256; states and sums in float32), "torch" or "reference";
        `longtrain.kernels.explain` tells what runs.

    A NaN or inf reaches what depends on it and nothing else: no other document, row or head, no output before it, and
    no gradient that it has no part in. The Triton kernels make one exception, the gradient of log_decay: there the own
    token of a bad k or v is reached, and where a q or dout is bad too, at a token before it in the same document and
    head, the tokens between the two. Of a first token's log-decay nothing depends where no state enters: whether a NaN
    there is felt is left open.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, backends, and
    log-decays above 0 (on a GPU, where the check would wait for the device, only under `longtrain.debug.checks()`).
    """
    check_inputs(q, k, v, log_decay)
    checks.true_or_false("return_state", return_state)
    if not isinstance(backend, str):
        raise ValueError(f"backend: got {backend!r}, expected a name such as 'auto'")
    factor = checks.number("scale", scale)
    factor = q.shape[3] ** -0.5 if factor is None else factor
    batch, tokens, heads, value_width = v.shape
    offsets = checks.operator_offsets(cu_seqlens, tokens=tokens, batch=batch)
    packed = cu_seqlens is not None
    if initial_state is not None:
        checks.floating("initial_state", initial_state, "[N, H, K, V]" if packed else "[B, H, K, V]")
        count = offsets.shape[0] - 1 if packed else batch
        expected = (count, heads, q.shape[3], value_width)
        checks.sizes("initial_state", initial_state, expected, "[N, H, K, V]" if packed else "[B, H, K, V]")
        checks.same_device(q=q, initial_state=initial_state)
        initial_state = initial_state[None] if packed else initial_state[:, None]  # [B, N, H, K, V]
    if backend == "reference":
        checks.never_positive("log_decay", log_decay)
        bounds = offsets.numpy()
        with without_autocast(q.device):
            out, state = reference.linear_attention(
                q, k, v, log_decay, bounds, scale=factor, initial_state=initial_state
            )
        out = out.to(q.dtype)
    else:
        out, state = operators.forward(
            q, k, v, log_decay, initial_state, offsets, scale=factor, return_state=return_state, backend=backend
        )
    return out, state.squeeze(0 if packed else 1) if return_state else None


def check_inputs(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Refuse, with a ValueError naming the argument, tensors that linear attention cannot take: see there."""
    checks.linear_inputs(q, k, v)
    checks.optional_log_decay(log_decay, q, v, meanings="[H], [B, T, H] or [B, T, H, K]")
    checks.same_device(q=q, k=k, v=v, log_decay=log_decay)
