"""The gate as its paper writes it, in plain PyTorch: it defines what is right. Autograd differentiates it."""

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 M] -> [..., M] in its dtype, computed in float32 or, for float64, in float64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
