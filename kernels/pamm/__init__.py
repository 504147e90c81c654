"""A projection that keeps few rows of its input for backward, instead of all."""

from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.pamm import operators

__all__ = ["pamm_linear"]


def pamm_linear(x: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """x weight^T, whose gradient of x is exact and whose gradient of weight is made from k rows of x.

        c = x[rows];  f(i) = argmax_j |<x_i, c_j>| / |c_j|;  a_i = <x_i, c_f(i)> / |c_f(i)|^2
        dx = dy weight;  dweight ~ sum_i a_i dy_i c_f(i)^T

    ("QKV Projections Require a Fraction of Their Memory", 2025: point-approximate matrix multiplication, with every row
    standing for the chosen one that it is most parallel to.) For backward it keeps c, a number and an index for each
    token: k D + 2 N numbers instead of N D. Exact where every x_i is parallel to one of the chosen.

    x [..., D] with N tokens, weight [O, D] -> y [..., O], in x's dtype, which weight has too. Sums of dweight are
    float32 (float64 for float64). A gradient has its tensor's dtype. Differentiable once.

    rows: int64 [k], k >= 1, on any device: which of the N tokens, counted over all leading dimensions, are kept.

    Raises ValueError naming the argument for other shapes, dtypes and devices.
    """
    if not isinstance(x, Tensor) or x.ndim < 1 or x.dtype not in checks.FLOATS:
        raise ValueError(f"x: got {_shown(x)}, expected a floating-point tensor [..., D]")
    checks.floating("weight", weight, "[O, D]")
    checks.sizes("weight", weight, (None, x.shape[-1]), "[O, D]")
    if weight.dtype != x.dtype:
        raise ValueError(f"weight: got dtype {weight.dtype}, expected that of x, {x.dtype}")
    checks.same_device(x=x, weight=weight)
    if not isinstance(rows, Tensor) or rows.ndim != 1 or "int64" not in str(rows.dtype) or not rows.numel():
        raise ValueError(f"rows: got {_shown(rows)}, expected an int64 tensor [k] with k at least 1")
    return operators.forward(x, weight, rows.to(x.device))[0]


def _shown(x: object) -> str:
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
