"""DeltaNet ("Parallelizing Linear Transformers with the Delta Rule over Sequence Length", equation 5, section 3.4)."""

from typing import Any

import torch
from torch import Tensor

from tests.layers.references.pieces import convolved, delta_rule, normed

CASES = [{"heads": 4}, {"heads": 2, "head_width": 6, "conv_width": None}]


def reference(mixer: Any, x: Tensor) -> Tensor:
    width = mixer.key_width
    q, k, v = convolved(mixer.convolution, x @ mixer.qkv.weight.T).chunk(3, dim=1)
    beta = torch.sigmoid(x @ mixer.beta.weight.T)
    outputs = []
    for head in range(q.shape[1] // width):
        part = slice(width * head, width * (head + 1))
        o = delta_rule(q[:, part], k[:, part], v[:, part], beta[:, head], torch.ones_like(q[:, part]))
        outputs.append(torch.stack([normed(row, mixer.norm.weight) for row in o]))
    return torch.cat(outputs, 1) @ mixer.out.weight.T
