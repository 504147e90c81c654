"""Linear attention token by token, in plain PyTorch: it defines what is right. Autograd differentiates it.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T          S [K, V], g_t = log_decay: one number per head, or one per channel
    o_t = scale * q_t S_t

"Transformers are RNNs" (Katharopoulos et al. 2020, equations 18 to 20, without their normaliser); with a decay:
"Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al. 2024, equation 3), of which fixed
decays per head ("Various Lengths, Constant Speed", Qin et al. 2024, equation 5) are a special case.
"""

import numpy as np
import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    offsets: np.ndarray,
    *,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over every segment of every row.

    q, k [B, T, G, K], v [B, T, H, V], log_decay None, [H], [B, T, H] or [B, T, H, K]; offsets: int64 [N+1], boundaries
    of the segments of each row; initial_state [B, N, H, K, V] or None (zeros).
    Returns out [B, T, H, V] and the states after each segment [B, N, H, K, V], in float64 where q, k or v is,
    otherwise in float32.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    batch, _, heads, value_width = v.shape
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    v = v.to(dtype)
    g = _per_token(log_decay, v).to(dtype)  # [B, T, H, 1 or K]
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    if initial_state is None:
        initial_state = v.new_zeros(batch, len(bounds), heads, k.shape[3], value_width)
    initial_state = initial_state.to(dtype)
    outputs, states = [v[:, :0]], []
    for n, (start, stop) in enumerate(bounds):
        state = initial_state[:, n]
        for t in range(start, stop):
            state = g[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
            outputs.append(scale * (q[:, t, :, None, :] @ state).transpose(1, 2))
        states.append(state)
    return torch.cat(outputs, 1), torch.stack(states, 1) if states else initial_state


def _per_token(log_decay: Tensor | None, v: Tensor) -> Tensor:
    """Any form of log_decay as [B, T, H, 1] or [B, T, H, K]."""
    if log_decay is None:
        return v.new_zeros(1).expand(*v.shape[:3], 1)
    if log_decay.ndim == 1:
        return log_decay[:, None].expand(*v.shape[:3], 1)
    return log_decay[..., None] if log_decay.ndim == 3 else log_decay
