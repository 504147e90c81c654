"""The RMS norm as its paper writes it, in plain PyTorch: it defines what is right. Autograd differentiates it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None, *, eps: float) -> Tensor:
    """x [..., D], weight [D] or None -> [..., D] in x's dtype, computed in float32 or, where one is, in float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    dtype = dtype if weight is None else torch.promote_types(dtype, weight.dtype)
    wide = x.to(dtype)
    y = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.to(dtype)).to(x.dtype)
