"""CHELA token by token ("Short-Long Convolutions Help Hardware-Efficient Linear Attention", section 3)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import normed, silu

CASES = [
    {"heads": 2, "places": 3, "scales": 3},
    {"heads": 4, "query_width": 20, "value_width": 12, "short": 1, "places": 5, "scales": 1},
]


def reference(mixer: Any, x: Tensor) -> Tensor:
    smooth = convolved(mixer.convolution, x)
    width, query, value, heads = x.shape[1], mixer.query_width, mixer.value_width, mixer.heads
    z, gamma, phi, inner = (smooth @ mixer.gates.weight.T + mixer.gates.bias).split((query, value, width, width), dim=1)
    q, k = (silu(z) * s + m for s, m in ((mixer.query_scale, mixer.query_shift), (mixer.key_scale, mixer.key_shift)))
    v = silu(x @ mixer.values.weight.T + mixer.values.bias)
    outputs = []
    for head in range(heads):
        own, part = (slice(n // heads * head, n // heads * (head + 1)) for n in (query, value))
        state, rows = x.new_zeros(query // heads, value // heads), []
        for t in range(len(x)):
            state = state + torch.outer(k[t, own], v[t, part])
            rows.append(normed(q[t, own] @ state / (query // heads) ** 0.5, mixer.norm.weight))
        outputs.append(torch.stack(rows))
    candidate = silu(inner + (silu(gamma) * torch.cat(outputs, 1)) @ mixer.out.weight.T)
    return torch.sigmoid(phi) * (candidate - x)


def convolved(module: Any, x: Tensor) -> Tensor:
    """The long filter made tap by tap, the short one added, and both applied token by token."""
    places, channels = module.places, module.channels
    long, short = module.long.view(module.scales, channels, places), module.short.view(channels, -1)
    taps, energy = [], 0.0
    for scale in range(module.scales):
        stretch = 2 ** max(scale - 1, 0)
        for tap in range(places * stretch):
            # Where the tap's middle lies among the middles of the places.
            place = min(max((tap + 0.5) / stretch - 0.5, 0), places - 1)
            left = int(place)
            right = min(left + 1, places - 1)
            mixed = (1 - (place - left)) * long[scale, :, left] + (place - left) * long[scale, :, right]
            taps.append(mixed * 0.5**scale)
            energy += 0.25**scale
    taps = [tap / energy**0.5 + (short[:, i] if i < short.shape[1] else 0) for i, tap in enumerate(taps)]
    rows = []
    for t in range(len(x)):
        rows.append(silu(sum((taps[i] * x[t - i] for i in range(min(len(taps), t + 1))), torch.zeros_like(x[0]))))
    return torch.stack(rows)
