"""The RMS norm and its gradients, tile by tile of tokens, so that float32 copies of them stay small.

With r = (mean(x^2) + eps)^(-1/2), n = r x and g = dy weight:

    y = n weight        dx = r (g - n mean(g n))        dweight = sum over tokens of dy n

On a GPU, where x and weight have one dtype, torch's fused kernels compute the same in one pass each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longtrain.kernels import launching

# Numbers of a tile: on a CPU half a megabyte in float32; an accelerator wants few large calls instead.
_CPU_TILE, _DEVICE_TILE = 2**17, 2**26


def state_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """What is computed in: float64 if one of the tensors is, otherwise float32."""
    return torch.float64 if torch.float64 in (x.dtype, None if weight is None else weight.dtype) else torch.float32


def forward(x: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """y [n, D] in x's dtype and r [n]; x [n, D]."""
    dtype = state_dtype(x, weight)
    if _fused(x, weight):
        y, r = torch.ops.aten._fused_rms_norm(x, [x.shape[1]], weight, eps)
        return y, r.reshape(-1).to(dtype)
    y, r = torch.empty_like(x), x.new_empty(x.shape[0], dtype=dtype)
    gain = None if weight is None else weight.to(dtype)
    for rows in _tiles(x):
        wide = x[rows].to(dtype)
        torch.rsqrt(wide.square().mean(-1).add_(eps), out=r[rows])
        normal = wide * r[rows, None]
        y[rows] = normal if gain is None else normal.mul_(gain)
    return y, r


def backward(dy: Tensor, x: Tensor, weight: Tensor | None, r: Tensor) -> tuple[Tensor, Tensor | None]:
    """dx [n, D] and dweight [D], each like its tensor; dy and x [n, D], r [n] from `forward`."""
    if _fused(x, weight):
        mask = [True, weight is not None]
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(dy, x, [x.shape[1]], r[:, None], weight, mask)
        return dx, dweight
    dx, dtype = torch.empty_like(x), r.dtype
    gain = None if weight is None else weight.to(dtype)
    dgain = None if gain is None else torch.zeros_like(gain)
    for rows in _tiles(x):
        gradient, normal = dy[rows].to(dtype), x[rows].to(dtype) * r[rows, None]
        if dgain is not None and gain is not None:
            dgain += (gradient * normal).sum(0)
            gradient = gradient * gain
        along = (gradient * normal).mean(-1, keepdim=True)
        dx[rows] = (gradient - normal.mul_(along)).mul_(r[rows, None])
    return dx, None if dgain is None or weight is None else dgain.to(weight.dtype)


def _fused(x: Tensor, weight: Tensor | None) -> bool:
    """Whether torch has a fused kernel for this."""
    same = weight is None or weight.dtype == x.dtype
    return x.device.type == "cuda" and same and x.dtype != torch.float64 and x.shape[0] > 0


def _tiles(x: Tensor) -> Sequence[slice]:
    tokens, width = x.shape
    size = max(1, (_CPU_TILE if x.device.type == "cpu" else _DEVICE_TILE) // width)
    return launching.tiles(tokens, size, x.device)
