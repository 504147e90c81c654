"""The convolution's two passes over segments, each with a halo: what the operator is made of, and what ranks call.

A rank of a spread sequence holds runs of consecutive tokens, its segments; the `width - 1` tokens before each of them,
the halo, come from other ranks. Their gradients go back there.
"""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.causal_conv1d import torch_impl
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.precision import without_autocast

WIDEST = 16  # of the Triton kernels, whose backward pass takes width ** 2 steps for a token


def convolve_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None = None,
    halo_counts: np.ndarray | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """y [B, T, D] in x's dtype.

    x [B, T, D], weight [D, width], bias [D] or None. offsets: int64 [N+1], boundaries of the segments of each row.
    halo: [B, N, width - 1, D], the tokens before each segment in order of position, or None for zeros.
    halo_counts: int64 [N], how many of them, the last ones, belong to the segment's document (None: all of them); what
        the others hold is never looked at.
    backend: "auto", "triton" or "torch".
    """
    options = {"halo": halo, "halo_counts": halo_counts, "activation": activation}
    with without_autocast(x.device):
        if chosen_backend(x, weight, halo, backend) == "triton":
            from longtrain.kernels.causal_conv1d import triton_impl

            return triton_impl.forward(x, weight, bias, offsets, **options)
        return torch_impl.forward(x, weight, bias, offsets, **options)


def convolve_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None = None,
    halo_counts: np.ndarray | None = None,
    activation: str | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and halo, each like its tensor (None for None), from dout [B, T, D].

    The halo's is 0 where `halo_counts` leaves a token out. The other arguments are those of forward.
    """
    options = {"halo": halo, "halo_counts": halo_counts, "activation": activation}
    with without_autocast(x.device):
        if chosen_backend(x, weight, halo, backend) == "triton":
            from longtrain.kernels.causal_conv1d import triton_impl

            return triton_impl.backward(dout, x, weight, bias, offsets, **options)
        return torch_impl.backward(dout, x, weight, bias, offsets, **options)


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What sums are computed in: float64 if one of the tensors is, otherwise float32."""
    return torch_impl.state_dtype(*tensors)


def chosen_backend(x: Tensor, weight: Tensor, halo: Tensor | None, requested: str) -> str:
    """The backend for a call; refuses what it cannot do."""
    dtype = state_dtype(x, weight, halo)
    chosen = choose_backend("causal_conv1d", requested, device=x.device, dtype=dtype)
    if chosen == "triton" and weight.shape[1] > WIDEST:
        if requested == "triton":
            raise ValueError(
                f"weight: got width {weight.shape[1]}, expected at most {WIDEST} with backend='triton'; "
                "'torch' takes any"
            )
        return "torch"
    return chosen
