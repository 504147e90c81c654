"""Gated slot attention's kernels on a card, against the float64 reference.

In half precision the operands of matrix products are rounded, to bfloat16 or, beside float16, to TF32; what that costs
is found on the same input (`rounding.py`).
"""

import pytest
import torch

from longtrain.kernels import explain, gated_slot_attention
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.gated_slot_attention_cases import assert_close_to_reference, errors, problem
from tests.kernels.rounding import budget, relative, to_dtype, to_tf32

pytestmark = pytest.mark.gpu

AXES = {
    "strength": ["slow", "fast", "mixed"],
    "heads": [(2, 2), (4, 2), (3, 1)],  # H, G
    "widths": [(64, 64, 64), (40, 100, 72), (128, 128, 32)],  # K, V, M
    "documents": [[130, 130], [0, 1, 170, 0, 64]],  # alike: rows of a batch
    "states": ["neither", "both"],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
}


@cover(AXES)
def test_kernels_are_the_reference(case):
    case = dict(case)
    dtype, documents = case.pop("dtype"), case["documents"]
    this = problem(**case, batch=len(documents) if len(set(documents)) == 1 else None)
    if dtype == torch.float32:
        assert_close_to_reference(this, dtype, "triton", "cuda")
        assert_close_to_reference(this, dtype, "torch", "cuda")
        return
    true, allowed = budget(this := this.rounded(dtype), dtype, to_dtype(dtype) if dtype == torch.bfloat16 else to_tf32)
    for name, error in relative(this.solve(dtype, "triton", "cuda"), true).items():
        assert error <= allowed[name], (name, error, allowed[name])


def test_a_long_row_is_cut_into_parts_and_results_repeat():
    assert "runs 'triton'" in explain("gated_slot_attention", device="cuda", dtype=torch.bfloat16)
    this = problem(heads=(1, 1), widths=(64, 64, 64), documents=[5000], batch=1)
    first, second = (this.solve(torch.float32, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    true = this.solve(torch.float64, "torch")
    allowed = errors(this.solve(torch.float32, "torch"), true)
    for name, error in errors(first, true).items():
        assert error <= max(8 * allowed[name], 1e-5), name


def test_more_than_256_slots_are_refused():
    q = torch.zeros(1, 16, 1, 16, device="cuda")
    wide = torch.zeros(1, 16, 1, 300, device="cuda")
    with pytest.raises(ValueError, match="the Triton kernels take M up to 256, not 300"):
        gated_slot_attention(q, q, q, wide, wide, backend="triton")
