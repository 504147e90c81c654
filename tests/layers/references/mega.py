"""Mega token by token ("Mega: Moving Average Equipped Gated Attention", equations 2 to 5 and 7 to 14)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import silu
from tests.layers.references.softmax import turned

CASES = [
    {"chunk": 8, "rates": 3},
    {"chunk": 16, "rates": 2, "query_width": 6, "value_width": 256, "rope_base": 100.0},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    smooth = averaged(mixer.average, x)
    width, query, value = x.shape[1], mixer.query_width, mixer.value_width
    z, gamma, phi, inner = (smooth @ mixer.gates.weight.T + mixer.gates.bias).split((query, value, width, width), dim=1)
    q, k = (silu(z) * s + m for s, m in ((mixer.query_scale, mixer.query_shift), (mixer.key_scale, mixer.key_shift)))
    v = silu(x @ mixer.values.weight.T + mixer.values.bias)
    rows = []
    for t in range(len(x)):
        first = t // mixer.chunk * mixer.chunk
        now = turned(q[t], t - first, mixer.rope_base)
        scores = [now @ turned(k[j], j - first, mixer.rope_base) for j in range(first, t + 1)]
        o = torch.softmax(torch.stack(scores) / query**0.5, 0) @ v[first : t + 1]
        candidate = silu(inner[t] + mixer.out.weight @ (silu(gamma[t]) * o))
        rows.append(torch.sigmoid(phi[t]) * (candidate - x[t]))
    return torch.stack(rows)


def averaged(module: Any, x: Tensor) -> Tensor:
    """The damped moving average of each channel, and SiLU."""
    alpha, delta, beta, eta = (
        w.view(module.channels, module.rates) for w in (module.alpha, module.delta, module.beta, module.eta)
    )
    alpha, delta = torch.sigmoid(alpha), torch.sigmoid(delta)
    state, rows = torch.zeros_like(alpha), []
    for t in range(len(x)):
        state = alpha * (beta * x[t, :, None]) + (1 - alpha * delta) * state
        rows.append(silu((eta * state).sum(1) + module.omega * x[t]))
    return torch.stack(rows)
