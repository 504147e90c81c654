"""Retention token by token ("Retentive Network", equations 5 to 8), each pair of channels as a complex number."""

from typing import Any

import torch
from torch import Tensor

CASES = [{"heads": 4}, {"heads": 2, "head_width": 6, "value_width": 5, "rope_base": 100.0}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    keys, values = mixer.key_width, mixer.value_width
    heads = mixer.out.in_features // values
    q, k, v, gate = (x @ mixer.qkvg.weight.T).split((heads * keys,) * 2 + (heads * values,) * 2, dim=1)
    theta = mixer.rope_base ** (-torch.arange(keys // 2, dtype=torch.float64) / (keys // 2))
    outputs = []
    for head in range(heads):
        own, part = slice(keys * head, keys * (head + 1)), slice(values * head, values * (head + 1))
        # log gamma in float32, as the layer keeps it
        gamma = torch.log(torch.tensor(1 - 2.0 ** (-5 - head), dtype=torch.float64)).float().to(x.dtype).exp()
        state, rows = torch.zeros(keys // 2, values, dtype=x.dtype.to_complex()), []
        for t in range(len(x)):
            turn = torch.polar(torch.ones_like(theta), theta * t).to(state.dtype)
            state = gamma * state + torch.outer(pairs(k[t, own]).conj() * turn.conj(), v[t, part].to(state.dtype))
            o = ((pairs(q[t, own]) * turn) @ state).real / keys**0.5
            rows.append((o - o.mean()) / (o.var(correction=0) + 1e-6).sqrt())
        outputs.append(torch.stack(rows))
    return (gate * torch.sigmoid(gate) * torch.cat(outputs, 1)) @ mixer.out.weight.T


def pairs(x: Tensor) -> Tensor:
    return torch.complex(*x.chunk(2))
