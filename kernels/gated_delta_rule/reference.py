"""The gated delta rule token by token, in plain PyTorch: it defines what is right. Autograd differentiates it.

    S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T      S [K, V], g_t = log_decay
    o_t = scale * q_t S_t

written as what is stored instead of what is there: with S' = diag(exp(g_t)) S_{t-1},

    u_t = beta_t (v_t - S'^T k_t),  S_t = S' + k_t u_t^T

"Linear Transformers Are Secretly Fast Weight Programmers" (Schlag et al. 2021, equations 23 to 25) without a decay;
"Gated Delta Networks" (Yang et al. 2024, equation 10) with one per head; "Kimi Linear" (2025, equation 1) per channel.
"""

import numpy as np
import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    offsets: np.ndarray,
    *,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over every segment of every row.

    q, k [B, T, G, K], v [B, T, H, V], beta [B, T, H], log_decay None, [B, T, H] or [B, T, H, K]; offsets: int64 [N+1],
    boundaries of the segments of each row; initial_state [B, N, H, K, V] or None (zeros).
    Returns out [B, T, H, V] and the states after each segment [B, N, H, K, V], in float64 where q, k or v is,
    otherwise in float32.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    batch, _, heads, value_width = v.shape
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    v, beta = v.to(dtype), beta.to(dtype)
    g = v.new_zeros(1).expand(*v.shape[:3]) if log_decay is None else log_decay.to(dtype)
    decay = (g[..., None] if g.ndim == 3 else g).exp()  # [B, T, H, 1 or K]
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    if initial_state is None:
        initial_state = v.new_zeros(batch, len(bounds), heads, k.shape[3], value_width)
    initial_state = initial_state.to(dtype)
    outputs, states = [v[:, :0]], []
    for n, (start, stop) in enumerate(bounds):
        state = initial_state[:, n]
        for t in range(start, stop):
            state = decay[:, t, :, :, None] * state
            there = (k[:, t, :, None, :] @ state).squeeze(2)  # [B, H, V]
            stored = beta[:, t, :, None] * (v[:, t] - there)
            state = state + k[:, t, :, :, None] * stored[:, :, None, :]
            outputs.append(scale * (q[:, t, :, None, :] @ state).transpose(1, 2))
        states.append(state)
    return torch.cat(outputs, 1), torch.stack(states, 1) if states else initial_state
