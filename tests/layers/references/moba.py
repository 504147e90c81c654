"""MoBA query by query ("MoBA: Mixture of Block Attention for Long-Context LLMs", section 2.2)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "kv_heads": 2, "block": 4, "picks": 4},
    {"heads": 2, "head_width": 6, "block": 5, "picks": 1},
    {"heads": 4, "block": 4, "picks": None},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, groups, width, length = mixer.heads, mixer.groups, mixer.key_width, mixer.block
    q, k, v = (x @ mixer.qkv.weight.T).split((heads * width, groups * width, groups * width), dim=1)
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        own, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        keys = [turned(k[j, shared], j, mixer.rope_base) for j in range(len(x))]
        rows = []
        for t in range(len(x)):
            query, block = turned(q[t, own], t, mixer.rope_base), t // length
            blocks = range(block)
            if mixer.picks is not None:
                score = [float((query @ sum(keys[b * length : (b + 1) * length])).detach()) / length for b in blocks]
                blocks = sorted(blocks, key=lambda b: -score[b])[: mixer.picks - 1]
            seen = [j for b in blocks for j in range(b * length, (b + 1) * length)]
            seen += range(block * length, t + 1)
            scores = torch.stack([query @ keys[j] for j in seen]) / width**0.5
            rows.append(torch.softmax(scores, 0) @ v[seen, shared])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, 1) @ mixer.out.weight.T
