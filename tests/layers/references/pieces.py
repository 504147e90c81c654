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


def normed(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return weight * x / (x.square().mean() + eps).sqrt()
