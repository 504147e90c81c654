"""Lizard token by token ("Lizard", section 4; feature map: "The Hedgehog & the Porcupine", section 4.2)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "kv_heads": 2, "window": 6, "memory": 3},
    {"heads": 2, "head_width": 6, "window": 0, "memory": 0, "feature_width": 4, "gate_temperature": 40.0},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, groups, width = mixer.heads, mixer.groups, mixer.key_width
    q, k, v = (x @ mixer.qkv.weight.T).split((heads * width, groups * width, groups * width), dim=1)
    gates = torch.sigmoid(x @ mixer.decay.weight.T + mixer.decay.bias) ** (1 / mixer.temperature)
    memory = None if mixer.memory is None else mixer.memory.view(2, -1, groups, width)  # keys, values
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        own, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        state, total, rows = x.new_zeros(2 * mixer.features, width), x.new_zeros(2 * mixer.features), []
        for t in range(len(x)):
            key = features(k[t, shared], mixer.k_features[group])
            state = gates[t, head] * state + torch.outer(key, v[t, shared])
            total = gates[t, head] * total + key
            query = features(q[t, own], mixer.q_features[head])
            far = query @ state / (query @ total)
            seen = range(max(0, t - mixer.window), t + 1)
            now = turned(q[t, own], t, mixer.rope_base)
            scores = [now @ turned(k[j, shared], j, mixer.rope_base) for j in seen]
            values = [v[j, shared] for j in seen]
            if memory is not None:
                scores += [q[t, own] @ key for key in memory[0, :, group]]
                values += list(memory[1, :, group])
            near = torch.softmax(torch.stack(scores) / width**0.5, 0) @ torch.stack(values)
            rows.append(near + far)
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, 1) @ mixer.out.weight.T


def features(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat((torch.softmax(x @ weight, 0), torch.softmax(-(x @ weight), 0)))
