"""Gated DeltaNet ("Gated Delta Networks: Improving Mamba2 with Delta Rule", equation 10 and section 3.3)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, delta_rule, normed, silu, softplus

CASES = [{"heads": 4}, {"heads": 4, "key_heads": 2, "key_width": 6, "value_width": 10, "conv_width": 3}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    key, value, heads = mixer.key_width, mixer.value_width, mixer.heads
    keys = (len(mixer.qkv.weight) - heads * value) // 2
    sharing = heads * key // keys
    q, k, v = convolved(mixer.convolution, x @ mixer.qkv.weight.T).split((keys, keys, heads * value), dim=1)
    gate = silu(x @ mixer.gate.weight.T)
    outputs = []
    for head in range(heads):
        mine = slice(value * head, value * (head + 1))
        shared = slice(key * (head // sharing), key * (head // sharing + 1))
        beta = torch.sigmoid(x @ mixer.rates.weight[head])
        step = softplus(x @ mixer.rates.weight[heads + head] + mixer.decay.dt_bias[head])
        decay = (-mixer.decay.A_log[head].exp() * step).exp()[:, None].expand(-1, key)
        o = delta_rule(q[:, shared], k[:, shared], v[:, mine], beta, decay)
        outputs.append(torch.stack([normed(row, mixer.norm.weight) for row in o]) * gate[:, mine])
    return torch.cat(outputs, 1) @ mixer.out.weight.T
