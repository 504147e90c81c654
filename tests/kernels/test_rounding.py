"""That what tests on a card allow is taken from the products of the passes, and from all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import gated_delta_rule_cases, gated_slot_attention_cases, test_linear_attention
from tests.kernels.rounding import relative, rounded_products, to_dtype, to_tf32

MODULES: dict[str, Any] = {
    "linear": test_linear_attention,
    "delta": gated_delta_rule_cases,
    "slot": gated_slot_attention_cases,
}


def test_tf32_has_ten_bits():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -3.0, 0.0], dtype=torch.float64)
    assert to_tf32(x).tolist() == [1, 1 + 2**-10, 1 + 2**-10, 1, -3, 0]


@pytest.mark.parametrize("operator", MODULES)
def test_rounded_products_cost_a_few_roundings(operator):
    this = MODULES[operator].problem(heads=(2, 1), documents=[70])
    true: dict[str, Tensor] = this.solve(torch.float64)
    costs = []
    for rounding in (to_dtype(torch.bfloat16), to_tf32, lambda x: x):
        with rounded_products(rounding):
            costs.append(relative(this.solve(torch.float64), true))
    for name in true:
        half, tf32, nothing = (cost[name] for cost in costs)
        assert nothing <= 1e-12 and (name == "dinitial_state" or half > 0), name
        assert half <= 12 * torch.finfo(torch.bfloat16).eps and tf32 <= half / 3, (name, half, tf32)
