"""What segments sum up to, by blocks of tokens, beside the same sums token by token."""

import math

import numpy as np
import pytest
import torch

from longtrain.kernels.linear_attention import summing


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("shape", [None, (4,), (2, 1300, 4), (2, 1300, 4, 5)], ids=["none", "head", "token", "channel"])
def test_sums_of_segments_longer_than_a_block(forward: bool, shape: tuple[int, ...] | None) -> None:
    seeded = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, 1300, n, width, generator=seeded, dtype=torch.float64) for n, width in ((2, 5), (4, 3)))
    decay = None if shape is None else -0.003 * torch.rand(shape, generator=seeded, dtype=torch.float64)
    if shape is not None and len(shape) > 1:
        assert decay is not None
        decay[0, 700, 1] = -math.inf  # forgets what came before, in one head
    offsets = np.array([0, 1, 1, 1100, 1300])  # one token, none, more than two blocks, less than one
    truth = torch.zeros(2, 4, 4, 5, 3, dtype=torch.float64)
    factors = torch.ones(2, 1300, 4, 1, dtype=torch.float64)
    if decay is not None:
        factors = (decay.expand(2, 1300, 4) if decay.ndim == 1 else decay).exp()
        factors = factors if factors.ndim == 4 else factors[..., None]
    for segment, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        state = truth[:, segment]
        for t in range(start, stop) if forward else reversed(range(start, stop)):
            outer = a[:, t].repeat_interleave(2, dim=1)[..., None] * b[:, t, :, None]
            factor = factors[:, t, :, :, None]
            state.copy_(factor * state + outer if forward else factor * (state + outer))
    found = summing.sum_up(a, b, decay, offsets, dtype=torch.float64, forward=forward)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
def test_sums_by_doubling_are_running_sums(length: int) -> None:
    x = torch.randn(length, 3, dtype=torch.float64)
    x[length // 2, 1] = -math.inf
    torch.testing.assert_close(summing.sums_by_doubling(x), x.cumsum(0))
