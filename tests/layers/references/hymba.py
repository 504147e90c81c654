"""Hymba token by token ("Hymba: A Hybrid-head Architecture for Small Language Models", section 2; see also mamba2)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, normed, silu, softplus
from tests.layers.references.softmax import turned

CASES = [
    {"heads": 4, "kv_heads": 2, "window": 6, "state_width": 6},
    {"heads": 2, "window": None, "head_width": 6, "expand": 3, "ssm_heads": 3, "conv_width": None},
]

Keys = tuple[list[list[Tensor]], list[list[Tensor]]]
"""Of each K/V head, the rotated keys and the values of all tokens."""


def reference(mixer: Any, x: Tensor) -> Tensor:
    return layer(mixer, x)[0]


def layer(mixer: Any, x: Tensor, before: Keys | None = None, *, meta: int = 0) -> tuple[Tensor, Keys]:
    """x [M + T, D], meta tokens first -> y alike, and keys and values; before: those of the layer before, to share."""
    q, k, v, z, convolving, dt = (x @ mixer.inputs.weight.T).split(mixer.sizes, dim=1)
    keys = before if mixer.share_kv else heads_of(mixer, k, v)
    assert keys is not None
    attended, recurred = attention(mixer, q, keys, meta), recurrence(mixer, z, convolving, dt)
    rows = []
    for a, r in zip(attended, recurred, strict=True):
        rows.append((normed(a, mixer.attention_norm.weight, 1e-6) + normed(r, mixer.ssm_norm.weight, 1e-6)) / 2)
    return torch.stack(rows) @ mixer.out.weight.T, keys


def heads_of(mixer: Any, k: Tensor, v: Tensor) -> Keys:
    keys = [[turned(row, t, mixer.rope_base) for t, row in enumerate(part)] for part in k.split(mixer.key_width, dim=1)]
    return keys, [list(part) for part in v.split(mixer.value_width, dim=1)]


def attention(mixer: Any, q: Tensor, keys: Keys, meta: int) -> Tensor:
    heads, groups, width = mixer.heads, mixer.groups, mixer.key_width
    outputs = []
    for head in range(heads):
        group, rows = head * groups // heads, []
        for t in range(len(q)):
            query = turned(q[t, head * width : (head + 1) * width], t, mixer.rope_base)
            near = 0 if mixer.window is None or t < meta else t - mixer.window
            seen = [j for j in range(t + 1) if j < meta or j >= near]  # meta tokens always
            scores = torch.stack([query @ keys[0][group][j] for j in seen]) / width**0.5
            rows.append(torch.softmax(scores, 0) @ torch.stack([keys[1][group][j] for j in seen]))
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, 1)


def recurrence(mixer: Any, z: Tensor, convolving: Tensor, dt: Tensor) -> Tensor:
    kept, heads = mixer.state_width, mixer.recurrent_heads
    inner = z.shape[1]
    width = inner // heads
    u, b, c = convolved(mixer.convolution, convolving).split((inner, kept, kept), dim=1)
    dt = softplus(dt + mixer.decay.dt_bias)
    outputs = []
    for head in range(heads):
        part, rate = slice(width * head, width * (head + 1)), -mixer.decay.A_log[head].exp()
        state, rows = z.new_zeros(width, kept), []
        for t in range(len(z)):
            state = (rate * dt[t, head]).exp() * state + dt[t, head] * torch.outer(u[t, part], b[t])
            rows.append(state @ c[t] + mixer.skip[head] * u[t, part])
        outputs.append(torch.stack(rows))
    return torch.cat(outputs, 1) * silu(z)
