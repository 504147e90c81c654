"""The causal convolution token by token, in plain PyTorch: it defines what is right. Autograd differentiates it.

    z_t = bias + sum_{i < width} weight[:, width - 1 - i] * x_{t - i},  y_t = z_t or silu(z_t)

"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (Gu and Dao 2023, section 3.4).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    activation: str | None,
    halo: Tensor | None = None,
    halo_counts: np.ndarray | None = None,
) -> Tensor:
    """The convolution of every segment of every row, [B, T, D]; arguments as of `passes.convolve_forward`.

    Computed and returned in float64 where one of the tensors is, otherwise in float32.
    """
    given = [y for y in (x, weight, bias, halo) if y is not None]
    dtype = torch.float64 if torch.float64 in [y.dtype for y in given] else torch.float32
    x, weight = x.to(dtype), weight.to(dtype)
    width = weight.shape[1]
    outputs = []
    for n, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        count = width - 1 if halo_counts is None else int(halo_counts[n])
        for t in range(start, stop):
            z = x.new_zeros(x.shape[0], x.shape[2]) if bias is None else bias.to(dtype).expand(x.shape[0], -1)
            for i in range(width):
                if t - i >= start:
                    z = z + weight[:, width - 1 - i] * x[:, t - i]
                elif halo is not None and start - (t - i) <= count:
                    z = z + weight[:, width - 1 - i] * halo[:, n, width - 1 + (t - i) - start].to(dtype)
            outputs.append(F.silu(z) if activation == "silu" else z)
    return torch.stack(outputs, 1) if outputs else x.clone()
