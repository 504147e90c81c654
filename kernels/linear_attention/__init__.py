"""Linear attention on one device: the public operator, and the staged passes that scans over ranks call too."""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.linear_attention import operators, reference
from longtrain.kernels.linear_attention.operators import check_values
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

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, backends, and
    log-decays above 0 (on a GPU, where the check would wait for the device, only under `longtrain.debug.checks()`).
    """
    check_inputs(q, k, v, log_decay)
    if not isinstance(return_state, bool):
        raise ValueError(f"return_state: got {return_state!r}, expected True or False")
    factor = checks.number("scale", scale)
    factor = q.shape[3] ** -0.5 if factor is None else factor
    batch, tokens, heads, value_width = v.shape
    offsets = _offsets(cu_seqlens, tokens=tokens, batch=batch)
    packed = cu_seqlens is not None
    if initial_state is not None:
        checks.floating("initial_state", initial_state, "[N, H, K, V]" if packed else "[B, H, K, V]")
        count = offsets.shape[0] - 1 if packed else batch
        expected = (count, heads, q.shape[3], value_width)
        checks.sizes("initial_state", initial_state, expected, "[N, H, K, V]" if packed else "[B, H, K, V]")
        checks.same_device(q=q, initial_state=initial_state)
        initial_state = initial_state[None] if packed else initial_state[:, None]  # [B, N, H, K, V]
    if backend == "reference":
        check_values(log_decay)
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
    checks.floating("q", q, "[B, T, G, K]")
    checks.floating("k", k, "[B, T, G, K]")
    checks.floating("v", v, "[B, T, H, V]")
    batch, tokens, heads, _ = v.shape
    checks.sizes("v", v, (batch, tokens, None, None), "[B, T, H, V]")
    for name, x, width in (("q", q, None), ("k", k, q.shape[3])):
        if x.shape[2] < 1 or heads % x.shape[2]:
            raise ValueError(f"{name}: got {x.shape[2]} heads, expected a divisor of v's {heads} heads")
        checks.sizes(name, x, (batch, tokens, None, width), "[B, T, G, K], with v's B and T and one K for q and k,")
    if log_decay is not None:
        _check_log_decay(log_decay, q, v)
    checks.same_device(q=q, k=k, v=v, log_decay=log_decay)


def _check_log_decay(log_decay: Tensor, q: Tensor, v: Tensor) -> None:
    forms = ((v.shape[2],), tuple(v.shape[:3]), (*v.shape[:3], q.shape[3]))
    meaning = "[H], [B, T, H] or [B, T, H, K]"
    if not isinstance(log_decay, Tensor):
        raise ValueError(f"log_decay: got {type(log_decay).__name__}, expected None or a tensor {meaning}")
    if log_decay.dtype not in checks.FLOATS:
        raise ValueError(f"log_decay: got dtype {log_decay.dtype}, expected float64, float32, bfloat16 or float16")
    if tuple(log_decay.shape) not in forms:
        expected = " or ".join(str(list(form)) for form in forms)
        raise ValueError(f"log_decay: got shape {tuple(log_decay.shape)}, expected None or {meaning}: {expected}")


def _offsets(cu_seqlens: Tensor | np.ndarray | None, *, tokens: int, batch: int) -> Tensor:
    """The boundaries int64 [N+1] on the CPU. A compiler cannot look at them: what is wrong there, the operator says."""
    if cu_seqlens is None:
        return torch.tensor([0, tokens])
    if isinstance(cu_seqlens, Tensor) and torch.compiler.is_compiling():
        return cu_seqlens.detach().to("cpu", torch.int64)
    return torch.from_numpy(checks.document_offsets("cu_seqlens", cu_seqlens, tokens=tokens, batch=batch))
