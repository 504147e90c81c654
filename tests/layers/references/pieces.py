"""What several of the papers' layers have in common, token by token."""

from typing import Any

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def softplus(x: Tensor) -> Tensor:
    return (1 + x.exp()).log()


def convolved(module: Any, x: Tensor) -> Tensor:
    """x [T, C] through a short causal convolution, channel by channel, and SiLU ("Mamba", section 3.4)."""
    if module.weight is None:
        return silu(x)
    filters = module.weight[:, 0]
    width, rows = filters.shape[1], []
    for t in range(len(x)):
        total = torch.zeros_like(x[0]) if module.bias is None else module.bias
        for back in range(min(width, t + 1)):
            total = total + filters[:, width - 1 - back] * x[t - back]
        rows.append(silu(total))
    return torch.stack(rows)


def unit(x: Tensor) -> Tensor:
    return x / (x @ x + 1e-6).sqrt()


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean() + eps).sqrt()


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """One head, with q and k made unit: q, k [T, K], v [T, V], beta [T], decay [T, K] (between 0 and 1) -> o [T, V].

    ``S_t = (I - beta_t k_t k_t^T) diag(decay_t) S_{t-1} + beta_t k_t v_t^T``, ``o_t = K^-1/2 q_t S_t``.
    """
    state, rows = q.new_zeros(q.shape[1], v.shape[1]), []
    identity = torch.eye(q.shape[1], dtype=q.dtype)
    for t in range(len(q)):
        key = unit(k[t])
        kept = (identity - beta[t] * torch.outer(key, key)) @ torch.diag(decay[t])
        state = kept @ state + beta[t] * torch.outer(key, v[t])
        rows.append(q.shape[1] ** -0.5 * unit(q[t]) @ state)
    return torch.stack(rows)
