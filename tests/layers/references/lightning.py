"""Lightning attention token by token ("Scaling TransNormer to 175 Billion Parameters", equations 4 to 6)."""

import torch
from torch import Tensor

CASES = [{"heads": 4}, {"heads": 2, "head_width": 6}]
LAYER, DEPTH = 1, 3  # of the tests


def reference(mixer: torch.nn.Module, x: Tensor) -> Tensor:
    width = mixer.key_width
    heads = mixer.out.in_features // width
    q, k, v, gate = (x @ mixer.qkvg.weight.T).chunk(4, dim=1)
    q, k = q * torch.sigmoid(q), k * torch.sigmoid(k)
    outputs = []
    for head in range(heads):
        part = slice(width * head, width * (head + 1))
        # To float32 and back, as the layer keeps it.
        decay = (torch.tensor(-(2.0 ** (-8 * (head + 1) / heads)) * (1 - LAYER / DEPTH))).to(x.dtype).exp()
        state, rows = x.new_zeros(width, width), []
        for t in range(len(x)):
            state = decay * state + torch.outer(k[t, part], v[t, part])
            o = width**-0.5 * q[t, part] @ state
            rows.append(o / (o.square().mean() + 1e-6).sqrt())
        outputs.append(torch.stack(rows))
    return (torch.cat(outputs, 1) * torch.sigmoid(gate)) @ mixer.out.weight.T
