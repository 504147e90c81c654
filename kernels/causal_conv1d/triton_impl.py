"""The convolution's Triton path: what is allocated and launched. Results and arguments are those of `passes`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.causal_conv1d import configs, triton_kernels
from longtrain.kernels.launching import architecture, launch


class _Call(NamedTuple):
    """What the kernels are given of one call."""

    x: Tensor  # channels contiguous
    halo: Tensor | None
    counts: Tensor | None
    taps: Tensor  # [width, D]: of the current token, of the one before, ...
    bias: Tensor | None
    segment_of: Tensor | None
    offsets: Tensor

    @property
    def source(self) -> tuple[Tensor | int | None, ...]:
        row = 0 if self.halo is None else self.halo.stride(0)
        return self.x, self.x.stride(0), self.x.stride(1), self.halo, row, self.counts, self.taps, self.bias


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None,
    halo_counts: np.ndarray | None,
    activation: str | None,
) -> Tensor:
    """See `passes.convolve_forward`."""
    call = _prepare(x, weight, bias, offsets, halo, halo_counts)
    batch, tokens, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = configs.forward(architecture(x.device))
    blocks = -(-tokens // config.constants["TOKENS"]), -(-channels // config.constants["CHANNELS"])
    arguments = (*call.source, call.segment_of, call.offsets, out, tokens, channels)
    constants = {"WIDTH": weight.shape[1], "SILU": activation is not None}
    launch(triton_kernels.convolve, (*blocks, batch), *arguments, config=config, **constants)
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None,
    halo_counts: np.ndarray | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `passes.convolve_backward`."""
    call = _prepare(x, weight, bias, offsets, halo, halo_counts)
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    dout = _channels_contiguous(dout)
    gradient = (dout, dout.stride(0), dout.stride(1))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    config = configs.backward(architecture(x.device))
    of_program = config.constants["TOKENS"] * config.constants["BLOCKS"]
    programs, columns = -(-tokens // of_program), -(-channels // config.constants["CHANNELS"])
    partial = x.new_empty((batch * programs, width + 1, channels), dtype=torch.float32)
    constants = {"WIDTH": width, "SILU": activation is not None}
    launch(
        triton_kernels.convolve_backward,
        (programs, columns, batch),
        *(*gradient, *call.source, call.segment_of, call.offsets, dx, partial, tokens, channels),
        config=config,
        **constants,
        SUMS=_power_of_2(width + 1),
    )
    sums = partial.sum(0)
    dweight = sums[:width].flip(0).t().contiguous().to(weight.dtype)
    dbias = None if bias is None else sums[width].to(bias.dtype)
    if call.halo is None:
        return dx, dweight, dbias, None if halo is None else torch.zeros_like(halo)
    dhalo = torch.empty_like(call.halo)
    config = configs.halo_backward(architecture(x.device))
    segments, columns = call.halo.shape[1], -(-channels // config.constants["CHANNELS"])
    launch(
        triton_kernels.halo_backward,
        (batch * segments, columns),
        *(*gradient, *call.source, call.offsets, dhalo, segments, channels),
        config=config,
        **constants,
        TOKENS=_power_of_2(width - 1),
    )
    return dx, dweight, dbias, dhalo


def _prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    halo: Tensor | None,
    halo_counts: np.ndarray | None,
) -> _Call:
    bounds = torch.from_numpy(offsets).to(x.device)
    segment_of = None
    if offsets.size > 2:
        token = torch.arange(x.shape[1], device=x.device)
        segment_of = torch.searchsorted(bounds, token, right=True, out_int32=True) - 1
    if halo is not None and (weight.shape[1] == 1 or not halo.shape[1]):
        halo = None  # nothing in it
    counts = None if halo is None or halo_counts is None else torch.from_numpy(halo_counts).to(x.device)
    return _Call(
        _channels_contiguous(x),
        None if halo is None else halo.contiguous(),
        counts,
        weight.t().flip(0).contiguous(),
        None if bias is None else bias.contiguous(),
        segment_of,
        bounds,
    )


def _channels_contiguous(x: Tensor) -> Tensor:
    """x itself, where a token's channels lie side by side, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _power_of_2(least: int) -> int:
    return 1 << max(least - 1, 0).bit_length()
