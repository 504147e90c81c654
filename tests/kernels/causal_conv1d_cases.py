"""Problems for the causal convolution, solved by any backend on any device; used by CPU, interpreter and GPU tests."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.causal_conv1d import convolve_backward, convolve_forward, reference

AXES = {
    "width": [1, 2, 4, 7],
    "activation": [None, "silu"],
    "bias": [True, False],
    "halo": ["none", "whole", "counted"],
    "documents": [[60], [0, 2, 38, 1, 0, 19], [3] * 20],
    "batch": [1, 3],
}


@dataclass
class Problem:
    """Float32 numbers, so that every dtype computes on the same ones."""

    inputs: dict[str, Tensor]  # x, weight and, where given, bias, halo
    dout: Tensor
    offsets: np.ndarray
    options: dict[str, Any]  # activation, halo_counts

    def in_dtype(self, dtype: torch.dtype, device: str = "cpu") -> tuple[dict[str, Any], Tensor]:
        """The inputs, None for what is not given, and the output's gradient."""
        given = {name: x.to(device, dtype, copy=True) for name, x in self.inputs.items()}
        return {"bias": None, "halo": None} | given, self.dout.to(device, dtype)

    def truth(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """y and the gradients of all inputs, by autograd through the reference."""
        inputs, dout = self.in_dtype(dtype)
        inputs = {name: x if x is None else x.requires_grad_() for name, x in inputs.items()}
        out = reference.convolve(offsets=self.offsets, **inputs, **self.options).to(dtype)
        given = {name: x for name, x in inputs.items() if x is not None}
        found = torch.autograd.grad(out, list(given.values()), dout, materialize_grads=True)
        return {"out": out.detach()} | {f"d{name}": x for name, x in zip(given, found, strict=True)}

    def solve(self, dtype: torch.dtype, backend: str, device: str = "cpu") -> dict[str, Tensor]:
        """The same by the two passes."""
        inputs, dout = self.in_dtype(dtype, device)
        passes = {**inputs, **self.options, "offsets": self.offsets, "backend": backend}
        results = {"out": convolve_forward(**passes)}
        gradients = convolve_backward(dout, **passes)
        names = ("x", "weight", "bias", "halo")
        results |= {f"d{name}": x for name, x in zip(names, gradients, strict=True) if x is not None}
        assert all(x.dtype == dtype for x in results.values())
        return {name: x.cpu() for name, x in results.items()}


def problem(
    width: int = 4,
    activation: str | None = "silu",
    bias: bool = True,
    halo: str = "none",
    documents: list[int] | tuple[int, ...] = (0, 2, 38, 1, 0, 19),
    batch: int = 1,
    channels: int = 5,
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    tokens, count = sum(documents), len(documents)
    inputs = {"x": random(batch, tokens, channels), "weight": random(channels, width)}
    if bias:
        inputs["bias"] = random(channels)
    counts = None
    if halo != "none":
        inputs["halo"] = random(batch, count, width - 1, channels)
        if halo == "counted":
            counts = np.arange(count) % width
            for n in range(count):  # what does not count is never looked at
                inputs["halo"][:, n, : width - 1 - counts[n]] = torch.nan
    offsets = np.concatenate(([0], np.cumsum(documents))).astype(np.int64)
    return Problem(inputs, random(batch, tokens, channels), offsets, {"activation": activation, "halo_counts": counts})


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to the largest number in it."""
    found = {}
    assert got.keys() == true.keys()
    for name, x in true.items():
        y = got[name].double()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0
    return found


def assert_close_to_reference(this: Problem, dtype: torch.dtype, backend: str, device: str = "cpu") -> None:
    """The error is at most 4 times that of autograd through the reference in `dtype`, and at most rounding in float64.

    Of half precision, that the reference rounds as the operators do: the output, and each gradient once.
    """
    true = this.truth()
    found = errors(this.solve(dtype, backend, device), true)
    if dtype == torch.float64:
        assert max(found.values()) <= 1e-10, found
        return
    if dtype != torch.float32:  # the rounding of the inputs is not the kernel's: they are rounded first
        rounded = {name: x.to(dtype).float() for name, x in this.inputs.items()}
        this = Problem(rounded, this.dout.to(dtype).float(), this.offsets, this.options)
        found = errors(this.solve(dtype, backend, device), this.truth())
        assert max(found.values()) <= 2 * torch.finfo(dtype).eps, found
        return
    allowed = errors(this.truth(dtype), true)
    assert all(error <= max(4 * allowed[name], 2e-6) for name, error in found.items()), (found, allowed)
