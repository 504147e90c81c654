"""Problems of `linear_cross_entropy`, and how far a solution is from the float64 reference: for CPU and GPU tests."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longtrain.kernels import linear_cross_entropy

NAMES = ("loss", "dhidden", "dweight")


@dataclass
class Problem:
    """Inputs in float32, so that every dtype computes on the same numbers, and a random gradient of the loss."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    dloss: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def solve(self, dtype: torch.dtype, backend: str = "auto", device: str = "cpu") -> dict[str, Tensor]:
        """The loss and the gradients of hidden and weight, by name."""
        hidden, weight = (x.to(device, dtype, copy=True).requires_grad_() for x in (self.hidden, self.weight))
        loss = linear_cross_entropy(hidden, weight, self.targets.to(device), **self.options, backend=backend)
        gradients = torch.autograd.grad(loss, (hidden, weight), self.dloss.to(device, loss.dtype))
        return dict(zip(NAMES, (loss.detach(), *gradients), strict=True))

    def rounded(self, dtype: torch.dtype) -> "Problem":
        """The same problem with inputs that a narrower dtype holds exactly."""
        hidden, weight = (x.to(dtype).float() for x in (self.hidden, self.weight))
        return Problem(hidden, weight, self.targets, self.dloss, self.options)


def problem(
    sizes: tuple[int, int, int] = (70, 24, 130),
    *,
    ignored: str = "some",
    reduction: str = "none",
    z_loss: float = 0.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    seed: int = 0,
) -> Problem:
    """sizes: N, D, vocabulary. Logits have a standard deviation of 3, and some lie near the softcaps tested."""
    generator = torch.Generator().manual_seed(seed)
    tokens, width, vocabulary = sizes
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator) * 3 * width**-0.5
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    dropped = {"none": 0.0, "some": 0.3, "all": 2.0}[ignored]
    targets[torch.rand(tokens, generator=generator) < dropped] = ignore_index
    dloss = torch.randn(targets.shape if reduction == "none" else (), generator=generator)
    options = {"ignore_index": ignore_index, "reduction": reduction, "z_loss": z_loss, "softcap": softcap}
    return Problem(hidden, weight, targets, dloss, options)


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each result, relative to the largest number in it."""
    found = {}
    for name, x in true.items():
        x, y = x.detach(), got[name].detach().to(x.device).double()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0
    return found
