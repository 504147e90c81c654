"""The convolution's kernels on a card, against the float64 reference."""

import pytest
import torch

from longtrain.kernels import causal_conv1d, explain
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.causal_conv1d_cases import assert_close_to_reference, problem

pytestmark = pytest.mark.gpu

AXES = {
    "width": [1, 2, 4, 16],
    "activation": [None, "silu"],
    "bias": [True, False],
    "halo": ["none", "whole", "counted"],
    "documents": [[300], [0, 2, 270, 1, 0, 27]],
    "batch": [1, 2],
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
}


@cover(AXES)
def test_kernels_are_the_reference(case):
    case = dict(case)
    dtype = case.pop("dtype")
    for backend in ("triton", "torch"):
        assert_close_to_reference(problem(**case, channels=200), dtype, backend, "cuda")


def test_auto_takes_the_kernels_and_repeats():
    assert "runs 'triton'" in explain("causal_conv1d", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1, 5000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn_like(x)
    results = []
    for _ in range(2):
        out = causal_conv1d(x, weight, activation="silu")
        results.append((out, *torch.autograd.grad(out, (x, weight), dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
