"""Gated linear attention token by token ("Gated Linear Attention Transformers", equation 3 and section 4.4)."""

from typing import Any

import torch
from torch import Tensor

CASES = [
    {"heads": 4},
    {"heads": 2, "key_width": 5, "value_width": 6, "gate_rank": 3, "gate_temperature": 40.0},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, keys, values = mixer.heads, mixer.key_width, mixer.value_width
    q, k, v, r = (x @ mixer.qkvg.weight.T).split((heads * keys,) * 2 + (heads * values,) * 2, dim=1)
    logits = x @ mixer.decay_in.weight.T @ mixer.decay_out.weight.T + mixer.decay_out.bias
    alpha = torch.sigmoid(logits) ** (1 / mixer.temperature)
    outputs = []
    for head in range(heads):
        own, part = slice(keys * head, keys * (head + 1)), slice(values * head, values * (head + 1))
        state, rows = x.new_zeros(keys, values), []
        for t in range(len(x)):
            state = alpha[t, own, None] * state + torch.outer(k[t, own], v[t, part])
            o = q[t, own] @ state / keys**0.5
            rows.append(mixer.norm.weight * o / (o.square().mean() + 1e-6).sqrt())
        outputs.append(torch.stack(rows))
    return (r * torch.sigmoid(r) * torch.cat(outputs, 1)) @ mixer.out.weight.T
