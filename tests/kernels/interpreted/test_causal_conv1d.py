"""The convolution's kernels, interpreted, against the float64 reference."""

import re

import pytest
import torch
from torch import Tensor

from longtrain.kernels import causal_conv1d
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.causal_conv1d_cases import assert_close_to_reference, problem
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)

# A backward program takes 128 tokens and 64 channels.
AXES = {
    "width": [1, 3, 4],
    "activation": [None, "silu"],
    "bias": [True, False],
    "halo": ["none", "whole", "counted"],
    "documents": [[137], [0, 2, 130, 1, 0]],
    "batch": [1, 2],
}


@cover(AXES)
def test_kernels_are_the_reference(case):
    assert_close_to_reference(problem(**case), torch.float32, "triton")


def test_wide():
    """More than 4 taps are not written out in the kernels."""
    assert_close_to_reference(problem(width=6, documents=[2, 9, 1], halo="counted"), torch.float32, "triton")


def test_several_blocks_of_channels():
    assert_close_to_reference(problem(documents=[11, 9], channels=150, halo="whole"), torch.float32, "triton")


def test_nan_stays_in_its_document_and_channel():
    generator = torch.Generator().manual_seed(0)
    x, weight, dout = (torch.randn(size, generator=generator) for size in ((1, 60, 5), (5, 4), (1, 60, 5)))
    x[0, 38, 2] = torch.nan

    def solve(backend: str) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        ends = torch.tensor([0, 20, 40, 60])
        out = causal_conv1d(*leaves, activation="silu", cu_seqlens=ends, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    for got, true in zip(solve("triton"), solve("torch"), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert got.isnan().any() and not got.isnan().all()


def test_strides_and_nothing_to_do():
    x = torch.randn(2, 6, 30).transpose(1, 2)
    for given in (x, x[..., ::2], x[:, :0], x[:0]):
        weight = torch.randn(given.shape[2], 4)
        leaf = given.detach().requires_grad_()
        out = causal_conv1d(leaf, weight, backend="triton")
        torch.testing.assert_close(out, causal_conv1d(given, weight, backend="torch"), rtol=1e-5, atol=1e-5)
        out.backward(torch.randn(out.shape))


def test_too_wide_is_refused_and_auto_takes_another():
    x, weight = torch.zeros(1, 20, 3), torch.zeros(3, 17)
    message = "weight: got width 17, expected at most 16 with backend='triton'; 'torch' takes any"
    with pytest.raises(ValueError, match=re.escape(message)):
        causal_conv1d(x, weight, backend="triton")
    assert torch.equal(causal_conv1d(x, weight), x)
