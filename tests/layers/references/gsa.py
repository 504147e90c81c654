"""Gated slot attention ("Gated Slot Attention for Efficient Linear-Time Sequence Modeling", equations 7 to 10).

With `activation` none it is that of section 4.3's models, whose projections were a softmax layer's: q, k and v as they
are, scores over sqrt(K) as there, and no norm.
"""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import normed, silu
from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "slots": 5},
    {"heads": 2, "head_width": 6, "slots": 9, "damping": 30.0},
    {"heads": 4, "kv_heads": 2, "slots": 7, "activation": "none", "rope_base": 100.0, "spread": True},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, groups, width, slots = mixer.heads, mixer.groups, mixer.key_width, mixer.slots
    plain = mixer.norm is None
    inner = x @ mixer.qkv.weight.T
    inner = inner if plain else silu(inner)
    q, k, v = inner.split((heads * width, groups * width, groups * width), dim=1)
    bias = 0 if mixer.forget.bias is None else mixer.forget.bias
    forget = torch.sigmoid(x @ mixer.forget.weight.T + bias) ** (1 / mixer.damping)
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        own, shared = slice(width * head, width * (head + 1)), slice(width * group, width * (group + 1))
        alpha = forget[:, slots * head : slots * (head + 1)]
        keys, values, rows = x.new_zeros(width, slots), x.new_zeros(slots, width), []
        for t in range(len(x)):
            query, key = q[t, own], k[t, shared]
            if mixer.rope_base is not None:
                query, key = (turned(z, t, mixer.rope_base) for z in (query, key))
            keys = keys * alpha[t] + torch.outer(key, 1 - alpha[t])
            values = alpha[t][:, None] * values + torch.outer(1 - alpha[t], v[t, shared])
            scores = query @ keys / (width**0.5 if plain else 1)
            rows.append(torch.softmax(scores, 0) @ values)
        outputs.append(torch.stack(rows))
    o = torch.cat(outputs, 1)
    y = o if plain else torch.stack([normed(row, mixer.norm.weight) for row in silu(o)])
    return y @ mixer.out.weight.T
