"""Mamba2 token by token ("Transformers are SSMs", equation 1 with A a number, and section 7)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, normed, silu, softplus

CASES = [{"heads": 4, "state_width": 8}, {"heads": 4, "groups": 2, "state_width": 6, "expand": 1, "conv_width": 5}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    heads, groups, kept = mixer.heads, mixer.groups, mixer.state_width
    inner = mixer.out.in_features
    width = inner // heads
    z, convolving, dt = (x @ mixer.inputs.weight.T).split((inner, inner + 2 * groups * kept, heads), dim=1)
    u, b, c = convolved(mixer.convolution, convolving).split((inner, groups * kept, groups * kept), dim=1)
    dt = softplus(dt + mixer.decay.dt_bias)
    outputs = []
    for head in range(heads):
        part = slice(width * head, width * (head + 1))
        group = head // (heads // groups)
        shared = slice(kept * group, kept * (group + 1))
        rate = -mixer.decay.A_log[head].exp()
        state, rows = x.new_zeros(width, kept), []
        for t in range(len(x)):
            state = (rate * dt[t, head]).exp() * state + dt[t, head] * torch.outer(u[t, part], b[t, shared])
            rows.append(state @ c[t, shared] + mixer.skip[head] * u[t, part])
        outputs.append(torch.stack(rows))
    gated = torch.cat(outputs, 1) * silu(z)
    parts = zip(gated.chunk(groups, dim=1), mixer.norm.chunk(groups), strict=True)
    y = torch.cat([torch.stack([normed(row, weight, 1e-5) for row in part]) for part, weight in parts], 1)
    return y @ mixer.out.weight.T
