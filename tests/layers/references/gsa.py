"""Gated slot attention ("Gated Slot Attention for Efficient Linear-Time Sequence Modeling", equations 7 to 10)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import normed, silu

CASES = [{"heads": 4, "slots": 5}, {"heads": 2, "head_width": 6, "slots": 9, "damping": 30.0}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    width, slots = mixer.key_width, mixer.slots
    q, k, v = silu(x @ mixer.qkv.weight.T).chunk(3, dim=1)
    forget = torch.sigmoid(x @ mixer.forget.weight.T) ** (1 / mixer.damping)
    outputs = []
    for head in range(mixer.heads):
        part = slice(width * head, width * (head + 1))
        alpha = forget[:, slots * head : slots * (head + 1)]
        keys, values, rows = x.new_zeros(width, slots), x.new_zeros(slots, width), []
        for t in range(len(x)):
            keys = keys * alpha[t] + torch.outer(k[t, part], 1 - alpha[t])
            values = alpha[t][:, None] * values + torch.outer(1 - alpha[t], v[t, part])
            rows.append(torch.softmax(q[t, part] @ keys, 0) @ values)
        outputs.append(torch.stack(rows))
    y = torch.stack([normed(row, mixer.norm.weight) for row in silu(torch.cat(outputs, 1))])
    return y @ mixer.out.weight.T
