"""Causal depthwise convolution over tokens on one device: the public operator, and the passes that ranks call too."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.causal_conv1d import operators, reference
from longtrain.kernels.causal_conv1d.passes import chosen_backend, convolve_backward, convolve_forward, state_dtype
from longtrain.kernels.precision import without_autocast

__all__ = ["causal_conv1d", "check_inputs", "check_options", "convolve_backward", "convolve_forward", "state_dtype"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = None,
    cu_seqlens: Tensor | np.ndarray | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mix each token with the few before it, channel by channel.

        z_t = bias + sum_{i < width} weight[:, width - 1 - i] * x_{t - i},  y_t = z_t or silu(z_t) = z_t * sigmoid(z_t)

    where tokens before the document's first one count as 0. (The short convolution of "Mamba: Linear-Time Sequence
    Modeling with Selective State Spaces", Gu and Dao 2023, section 3.4.)

    x [B, T, D] -> y [B, T, D] in x's dtype. Dtypes may differ; where one is float64 all is computed in float64,
    otherwise in float32. A gradient has its tensor's dtype.

    weight: [D, width], width >= 1 (with the Triton kernels at most 16); weight[:, -1] multiplies the current token.
    bias: [D].
    activation: None or "silu".
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        no token sees another document. Best kept on the CPU: elsewhere the host waits to read it.
    backend: "auto", "triton", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    A NaN or inf in x reaches the tokens that see it, in its channel and document, and the gradients of weight and bias.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, backends.
    """
    check_inputs(x, weight, bias)
    check_options(x, weight, activation=activation, backend=backend)
    offsets = None
    if torch.compiler.is_compiling():  # values cannot be looked at: the operator does it when it runs
        offsets = None if cu_seqlens is None else torch.as_tensor(cu_seqlens).cpu()
    elif cu_seqlens is not None:
        bounds = checks.document_offsets("cu_seqlens", cu_seqlens, tokens=x.shape[1], batch=x.shape[0])
        offsets = torch.from_numpy(bounds)
    if backend == "reference":
        bounds = checks.document_offsets("cu_seqlens", offsets, tokens=x.shape[1], batch=x.shape[0])
        with without_autocast(x.device):
            return reference.convolve(x, weight, bias, bounds, activation=activation).to(x.dtype)
    return operators.forward(x, weight, bias, None, offsets, None, activation=activation, backend=backend)


def check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse, with a ValueError naming the argument, tensors that the convolution cannot take: see there."""
    checks.floating("x", x, "[B, T, D]")
    checks.floating("weight", weight, "[D, width]")
    checks.sizes("weight", weight, (x.shape[2], None), "[D, width]")
    if bias is not None:
        checks.floating("bias", bias, "[D]")
        checks.sizes("bias", bias, (x.shape[2],), "[D]")
    checks.same_device(x=x, weight=weight, bias=bias)


def check_options(x: Tensor, weight: Tensor, *, activation: str | None, backend: str) -> None:
    """Refuse, with a ValueError naming the argument, an activation that there is not and a backend that cannot run."""
    if activation not in (None, "silu"):
        raise ValueError(f"activation: got {activation!r}, expected None or 'silu'")
    if not torch.compiler.is_compiling():  # the operator does it when it runs
        chosen_backend(x, weight, None, backend)
