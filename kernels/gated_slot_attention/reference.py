"""Gated slot attention token by token, in plain PyTorch: it defines what is right. Autograd differentiates it.

    A_t = A_{t-1} diag(exp(g_t)) + k_t slot_t^T       A [K, M], the slots' keys; g_t = log_decay [M]
    C_t = diag(exp(g_t)) C_{t-1} + slot_t v_t^T       C [M, V], the slots' values
    o_t = softmax(scale * q_t A_t) C_t

"Gated Slot Attention for Efficient Linear-Time Sequence Modeling" (Zhang et al. 2024, equations 7 to 9, where slot_t is
1 - exp(g_t); here it is given).
"""

import numpy as np
import torch
from torch import Tensor

States = tuple[Tensor, Tensor]


def gated_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    offsets: np.ndarray,
    *,
    scale: float,
    initial_state: States | None,
) -> tuple[Tensor, States]:
    """The recurrence over every segment of every row.

    q, k [B, T, G, K], v [B, T, H, V], slot, log_decay [B, T, H, M]; offsets: int64 [N+1], boundaries of the segments of
    each row; initial_state: A [B, N, H, K, M] and C [B, N, H, M, V], or None (zeros).
    Returns out [B, T, H, V] and the states after each segment, in float64 where q, k, v or slot is, else in float32.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype, slot.dtype) else torch.float32
    batch, _, heads, value_width = v.shape
    q, k = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    v, slot, decay = v.to(dtype), slot.to(dtype), log_decay.to(dtype).exp()
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    if initial_state is None:
        shape = batch, len(bounds), heads
        initial_state = (
            v.new_zeros(*shape, k.shape[3], slot.shape[3]),
            v.new_zeros(*shape, slot.shape[3], value_width),
        )
    keys_before, values_before = (x.to(dtype) for x in initial_state)
    outputs, keys_after, values_after = [v[:, :0]], [], []
    for n, (start, stop) in enumerate(bounds):
        keys, values = keys_before[:, n], values_before[:, n]
        for t in range(start, stop):
            keys = keys * decay[:, t, :, None, :] + k[:, t, :, :, None] * slot[:, t, :, None, :]
            values = decay[:, t, :, :, None] * values + slot[:, t, :, :, None] * v[:, t, :, None, :]
            weights = torch.softmax(scale * q[:, t, :, None, :] @ keys, -1)
            outputs.append((weights @ values).transpose(1, 2))
        keys_after.append(keys)
        values_after.append(values)
    states = (torch.stack(keys_after, 1), torch.stack(values_after, 1)) if bounds else (keys_before, values_before)
    return torch.cat(outputs, 1), states
