"""What is compared: an operator of longtrain or of a rival on inputs they share, checked before it is timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SEED = 20_26
# Relative error that results may have, in units of their dtype's rounding: operands, weights and results are rounded.
BUDGET = {torch.bfloat16: 2.0, torch.float16: 2.0, torch.float32: 200.0, torch.float64: 200.0}

Operator = Callable[..., Tensor]  # of the inputs by position; its one output


class Disagreement(Exception):
    """A side's results are wrong: nothing is timed."""


@dataclass
class Side:
    """One operator on inputs; those that take gradients are leaves that require them. dout: of its output."""

    operator: Operator
    inputs: Sequence[Tensor]
    dout: Tensor | None = None

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.operator(*self.inputs)

    def backward(self) -> "Call":
        """A call that goes backward through one forward pass, again and again; it holds what that pass kept."""
        out = self.operator(*self.inputs)
        leaves = [x for x in self.inputs if x.requires_grad]
        return lambda: torch.autograd.grad(out, leaves, self.dout, retain_graph=True)

    def both(self) -> tuple[Tensor, ...]:
        """The output, and the gradients of the leaves."""
        out = self.operator(*self.inputs)
        leaves = [x for x in self.inputs if x.requires_grad]
        return out.detach(), *torch.autograd.grad(out, leaves, self.dout)


Call = Callable[[], object]


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as leaves that take gradients."""
    return tuple(x.detach().requires_grad_() for x in tensors)


def wider(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Floating-point tensors in the dtype that tells what their own loses, as leaves where they are."""
    double = {torch.float32: torch.float64}
    found = []
    for x in tensors:
        if x.is_floating_point():
            x = x.detach().to(double.get(x.dtype, torch.float32)).requires_grad_(x.requires_grad)
        found.append(x)
    return tuple(found)


def deviations(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The relative error of each result: norm of the difference over norm of the truth."""
    found = []
    for mine, wanted in zip(results, truth, strict=True):
        wide = torch.float64 if wanted.device.type == "cpu" else torch.float32
        wanted = wanted.to(wide)
        norm = float(wanted.norm())
        found.append(float((mine.to(wide) - wanted).norm()) / (norm or 1.0))
    return found


def check(name: str, results: Sequence[Tensor], truth: Sequence[Tensor], *, dtype: torch.dtype) -> float:
    """The largest relative error of any result.

    Raises:
        Disagreement: it is more than what a computation in `dtype` loses.
    """
    found = deviations(results, truth)
    allowed = BUDGET[dtype] * torch.finfo(dtype).eps
    if not all(error <= allowed for error in found):  # NaN is wrong too
        listed = ", ".join(f"{error:.1e}" for error in found)
        raise Disagreement(f"{name}: relative errors {listed} of the output and the gradients, more than {allowed:.1e}")
    return max(found)


def random(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers; the same for the same seed, shape and device."""
    generator = torch.Generator(device).manual_seed(SEED + seed)
    return torch.randn(*shape, generator=generator, dtype=dtype, device=device)


def first_tokens(tensors: Sequence[Tensor], tokens: int) -> tuple[Tensor, ...]:
    """The first tokens of inputs [B, T, ...] (others as they are), leaves where they were."""
    return tuple(
        x.detach()[:, :tokens].contiguous().requires_grad_(x.requires_grad) if x.ndim >= 3 else x for x in tensors
    )


def named(sides: Mapping[str, Side], direction: str) -> dict[str, Call]:
    """The calls of all sides in one direction, "forward", "backward" or "both"."""
    if direction == "backward":
        return {name: side.backward() for name, side in sides.items()}
    return {name: getattr(side, direction) for name, side in sides.items()}
