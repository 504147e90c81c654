"""RAT token by token ("RAT: Bridging RNN Efficiency and Attention Accuracy", section 3)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "chunk": 4},
    {"heads": 2, "head_width": 6, "chunk": 16, "rope_base": 100.0, "strategy": "allgather"},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, width, length = mixer.heads, mixer.key_width, mixer.chunk
    q, k, v = (x @ mixer.qkv.weight.T).split((width, width, heads * width), dim=1)
    g, z = torch.sigmoid(x @ mixer.gates.weight.T + mixer.gates.bias).split(heads * width, dim=1)
    outputs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        finished: list[tuple[Tensor, Tensor]] = []  # the last k~ and v~ of each chunk before
        rows = []
        for t in range(len(x)):
            if t % length == 0:
                key = value = x.new_zeros(width)
            key = g[t, own] * key + (1 - g[t, own]) * k[t]
            value = g[t, own] * value + (1 - g[t, own]) * v[t, own]
            number = t // length
            query = turned(q[t], number, mixer.rope_base)
            keys = [turned(k_, j, mixer.rope_base) for j, (k_, _) in enumerate([*finished, (key, value)])]
            weights = torch.softmax(torch.stack([query @ one for one in keys]) / width**0.5, 0)
            rows.append(weights @ torch.stack([v_ for _, v_ in [*finished, (key, value)]]))
            if t % length == length - 1:
                finished.append((key, value))
        outputs.append(torch.stack(rows))
    return (z * torch.cat(outputs, 1)) @ mixer.out.weight.T
