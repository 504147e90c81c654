"""What it costs that a card rounds the operands of matrix products: float64 passes whose products do the same.

The torch paths have the products of the kernels. With operands rounded as a card rounds them, and all else exact, the
passes lose what the kernels may lose, on the same input.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]


def to_dtype(dtype: torch.dtype) -> Rounding:
    """Rounds to numbers that `dtype` has."""
    return lambda x: x.to(dtype).to(x.dtype)


def to_tf32(x: Tensor) -> Tensor:
    """Rounds to TF32: float32 with 10 bits of mantissa."""
    bits = x.to(torch.float32).view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


@contextmanager
def rounded_products(rounding: Rounding) -> Iterator[None]:
    """Inside, the torch paths multiply matrices of rounded numbers.

    A triangular system is solved as the kernels do it: by its inverse, which is rounded too.
    """
    bmm, baddbmm, added = torch.bmm, torch.baddbmm, Tensor.baddbmm_
    matmul, solve = torch.matmul, torch.linalg.solve_triangular

    def solve_by_inverse(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        inverse = solve(a, torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a), **options)
        return matmul(rounding(inverse), rounding(b))

    with (
        patch.object(torch, "bmm", lambda a, b, **options: bmm(rounding(a), rounding(b), **options)),
        patch.object(torch, "matmul", lambda a, b: matmul(rounding(a), rounding(b))),
        patch.object(torch, "baddbmm", lambda x, a, b, **options: baddbmm(x, rounding(a), rounding(b), **options)),
        patch.object(Tensor, "baddbmm_", lambda x, a, b, **options: added(x, rounding(a), rounding(b), **options)),
        patch.object(torch.linalg, "solve_triangular", solve_by_inverse),
    ):
        yield


def relative(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each tensor's error relative to its own norm; all numbers finite."""
    found = {}
    for name, x in true.items():
        y, x = got[name].detach().cpu().double(), x.detach().cpu()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).norm() / x.norm().clamp_min(1e-30))
    return found


def budget(this: Any, dtype: torch.dtype, rounding: Rounding) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The true results of a problem whose numbers `dtype` has, and what each may be off in `relative`.

    Twice what rounded operands cost, since the kernels round some with other factors in them, and two roundings (of
    norms, eps / 2 at most): of the result, and of the scores that the kernels find gradients of decays by.
    """
    true = this.solve(torch.float64, "torch")
    with rounded_products(rounding):
        lost = relative(this.solve(torch.float64, "torch"), true)
    return true, {name: 2 * error + torch.finfo(dtype).eps for name, error in lost.items()}
