"""Lightning attention token by token ("Scaling TransNormer to 175 Billion Parameters", equations 4 to 6)."""

from typing import Any

import torch
from torch import Tensor

CASES = [
    {"heads": 4},
    {"heads": 2, "head_width": 6, "decay": "heads", "norm": "joint", "gate": "linear", "lrpe": "all", "scale": 1.0},
    {"heads": 4, "decay": "minimax", "norm": "learned", "value_silu": True, "scale": 1.0},
]
LAYER, DEPTH = 1, 3  # of the tests


def reference(mixer: Any, x: Tensor) -> Tensor:
    options, width = mixer.options, mixer.key_width
    q, k, v, gate = (x @ mixer.qkvg.weight.T).chunk(4, dim=1)
    q, k = swish(q), swish(k)
    v = swish(v) if options.value_silu else v
    outputs = []
    for head in range(options.heads):
        part = slice(width * head, width * (head + 1))
        slope = 2.0 ** (-8 * (head + 1) / options.heads)
        slope *= {"depth": 1 - LAYER / DEPTH, "minimax": 1 - LAYER / (DEPTH - 1 + 1e-5) + 1e-5, "heads": 1}[
            options.decay
        ]
        decay = torch.tensor(-slope, dtype=torch.float32).to(x.dtype).exp()  # in float32, as the layer keeps it
        state, rows = x.new_zeros(width, width), []
        past = x.new_zeros(width, width)  # LRPE's imaginary part
        for t in range(len(x)):
            # S = sum_s decay^(t-s) e^(-i theta s) k_s v_s, and o = Re(q e^(i theta t) S)
            angle = torch.zeros_like(x[0, :width]) if mixer.theta is None else mixer.theta[part] * t
            state = decay * state + torch.outer(k[t, part] * angle.cos(), v[t, part])
            past = decay * past + torch.outer(k[t, part] * angle.sin(), v[t, part])
            o = (q[t, part] * angle.cos()) @ state + (q[t, part] * angle.sin()) @ past
            o = o * (width**-0.5 if options.scale is None else options.scale)
            rows.append(o / (o.square().mean() + 1e-6).sqrt() if options.norm == "head" else o)
        outputs.append(torch.stack(rows))
    y = torch.cat(outputs, 1)
    if options.norm != "head":
        y = y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
    if options.norm == "learned":
        y = mixer.norm.weight * y
    return (y * (torch.sigmoid(gate) if options.gate == "sigmoid" else gate)) @ mixer.out.weight.T


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
