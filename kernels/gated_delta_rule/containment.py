"""NaN and inf stay with the tokens that see them, where a product over the tokens of a chunk has masked weights.

A masked weight is 0, and 0 * NaN is NaN: one bad token would reach those before it. So what is not finite is taken out
of the operand, and NaN is written to whatever comes at or after the first of it (in backward, up to the last of it),
where all that depends on it lies. Tensors are [m, H, C, .], and each column is judged by itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def all_finite(*tensors: Tensor) -> bool:
    """Whether it is known that all numbers are finite; on an accelerator it never is: asking would wait for it."""
    # A sum is finite only where all its terms are; one that overflows costs time and nothing else.
    return all(x.device.type == "cpu" and bool(x.sum().isfinite()) for x in tensors)


def without(x: Tensor) -> Tensor:
    """x with zeros for what is not finite."""
    return x.masked_fill(~x.isfinite(), 0)


def marked(rates: Tensor, k: Tensor, log: Tensor) -> Tensor:
    """rates [m, H, C, 1], with NaN where a token's rate, k or log-decay is not finite (that may be -inf)."""
    bad = ~rates.isfinite() | ~k.isfinite().all(-1, keepdim=True) | log.isnan().any(-1, keepdim=True)
    return rates.masked_fill(bad, torch.nan)


def divided(marks: Tensor) -> Tensor:
    """Whether any of the tokens from j to i is marked, for i >= j: marks [m, H, C, 1] bool -> [m, H, C, C]."""
    count = marks.cumsum(-2)
    return count != (count - marks.long()).transpose(2, 3)


def forward_product(product: Product, x: Tensor) -> Tensor:
    """product(x) for one that gives each token a sum over those up to it."""
    return product(without(x)).masked_fill_((~x.isfinite()).cumsum(-2) > 0, torch.nan)


def backward_product(product: Product, x: Tensor, marks: Tensor | None = None) -> Tensor:
    """product(x) for one that gives each token a sum over those from it on; marks [m, H, C, 1] count as not finite."""
    bad = ~x.isfinite() if marks is None else ~x.isfinite() | marks
    return product(without(x)).masked_fill_(bad.flip(-2).cumsum(-2).flip(-2) > 0, torch.nan)
