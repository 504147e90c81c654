"""Kimi Delta Attention ("Kimi Linear: An Expressive, Efficient Attention Architecture", equation 1 and section 4)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, delta_rule, normed, softplus

CASES = [{"heads": 4}, {"heads": 2, "head_width": 6, "rank": 3, "conv_width": 1}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    width = mixer.key_width
    q, k, v = convolved(mixer.convolution, x @ mixer.qkv.weight.T).chunk(3, dim=1)
    beta = torch.sigmoid(x @ mixer.beta.weight.T)
    for_decay, for_gate = (x @ mixer.low.weight.T).chunk(2, dim=1)
    step = softplus(for_decay @ mixer.rates.weight.T + mixer.decay.dt_bias)
    gate = torch.sigmoid(for_gate @ mixer.gate.weight.T)
    outputs = []
    for head in range(mixer.heads):
        part = slice(width * head, width * (head + 1))
        decay = (-mixer.decay.A_log[head].exp() * step[:, part]).exp()
        o = delta_rule(q[:, part], k[:, part], v[:, part], beta[:, head], decay)
        outputs.append(torch.stack([normed(row, mixer.norm.weight) for row in o]) * gate[:, part])
    return torch.cat(outputs, 1) @ mixer.out.weight.T
