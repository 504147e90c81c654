"""Softmax attention query by query ("Attention Is All You Need", equation 1; rotation: RoFormer, equation 34)."""

from typing import Any

import torch
from torch import Tensor

CASES = [
    {"heads": 4},
    {"heads": 4, "kv_heads": 2, "window": 5, "qk_norm": True},
    {"heads": 2, "head_width": 6, "sinks": True, "rope_base": 100.0, "softcap": 3.0, "strategy": "allgather"},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, groups, width = mixer.heads, mixer.groups, mixer.key_width
    q, k, v = (x @ mixer.qkv.weight.T).split((heads * width, groups * width, groups * width), dim=1)
    rows = []
    for i in range(len(x)):
        outputs = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head * groups // heads * width, (head * groups // heads + 1) * width)
            first = 0 if mixer.window is None else max(0, i - mixer.window)
            query = turned(normed(q[i, own], mixer.q_norm), i, mixer.rope_base)
            keys = [turned(normed(k[j, shared], mixer.k_norm), j, mixer.rope_base) for j in range(first, i + 1)]
            scores = torch.stack([query @ key for key in keys]) / width**0.5
            if mixer.attention.softcap is not None:
                scores = mixer.attention.softcap * torch.tanh(scores / mixer.attention.softcap)
            weights = scores.exp() / (scores.exp().sum() + (mixer.sinks[head].exp() if mixer.sinks is not None else 0))
            outputs.append(weights @ v[first : i + 1, shared])
        rows.append(torch.cat(outputs))
    return torch.stack(rows) @ mixer.out.weight.T


def normed(x: Tensor, norm: Any) -> Tensor:
    return x if norm is None else norm.weight * x / (x.square().mean() + 1e-6).sqrt()


def turned(x: Tensor, position: int, base: float) -> Tensor:
    """Each pair (i, i + K/2) as a complex number times e^(i angle)."""
    half = len(x) // 2
    angles = position * base ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles).to(x.dtype.to_complex())
    return torch.cat((z.real, z.imag))
