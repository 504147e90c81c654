"""`linear_cross_entropy` on a card: bfloat16, float16 and float32 against the float64 reference, and what it holds."""

import pytest
import torch

from longtrain import debug
from longtrain.kernels import linear_cross_entropy
from longtrain.kernels.linear_cross_entropy import configs
from tests.kernels.linear_cross_entropy_cases import errors, problem

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("sizes", [(1000, 96, 5003), (5003, 96, 1000), (300, 64, 16_384)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (8.0, 1e-3)])
def test_triton_is_the_reference(dtype, sizes, softcap, z_loss, backend, monkeypatch):
    monkeypatch.setattr(configs, "tile_sizes", lambda width: (768, 2048))
    this = problem(sizes, softcap=softcap, z_loss=z_loss).rounded(dtype)
    true = this.solve(torch.float64, "reference", "cuda")
    found = errors(this.solve(dtype, backend, "cuda"), true)
    allowed = errors(this.solve(torch.float32, "reference", "cuda"), true)  # on the same numbers
    if dtype != torch.float32:  # logits and losses are float32 too; dz and the gradients are rounded once
        assert max(found.values()) <= 2 * torch.finfo(dtype).eps, found
        found = {"loss": found["loss"]}
    assert all(found[name] <= max(4 * allowed[name], 2e-6) for name in found), (found, allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_over_many_tokens_keeps_its_digits(dtype):
    this = problem((4096, 64, 3000), reduction="mean").rounded(dtype)
    this.dloss.fill_(1e-3)
    true = this.solve(torch.float64, "reference", "cuda")
    exact = {name: x.to(dtype).double() for name, x in true.items()}  # float16 itself may not hold such numbers
    rounding = errors(exact, true)
    for name, error in errors(this.solve(dtype, "triton", "cuda"), true).items():
        assert error <= 2 * torch.finfo(dtype).eps + rounding[name], name


def test_a_token_that_is_not_a_number_stays_alone():
    this = problem((300, 64, 2000), ignored="none").rounded(torch.bfloat16)
    clean = this.solve(torch.bfloat16, "triton", "cuda")
    this.hidden[5, 2] = torch.nan
    got = this.solve(torch.bfloat16, "triton", "cuda")
    others = torch.arange(300) != 5
    assert got["loss"][5].isnan()
    for name in ("loss", "dhidden"):
        assert torch.equal(got[name].cpu()[others], clean[name].cpu()[others])
    this.targets[5] = -100
    assert this.solve(torch.bfloat16, "triton", "cuda")["dweight"].isfinite().all()


def test_targets_are_checked_where_asked_for():
    hidden, weight = torch.randn(8, 16, device="cuda"), torch.randn(10, 16, device="cuda")
    targets = torch.arange(8, device="cuda") + 3
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    assert losses.isnan().tolist() == [False] * 7 + [True]
    with debug.checks(), pytest.raises(ValueError, match="targets: got 10, expected 0 to 9"):
        linear_cross_entropy(hidden, weight, targets)


def test_memory_is_a_tile_and_one_gradient():
    """16,384 tokens, D 2048, vocabulary 65,536 in bfloat16: the logits alone would be 2 GiB, in float32 4 GiB."""
    hidden = torch.randn(16_384, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(65_536, 2048, device="cuda") / 45).bfloat16().requires_grad_()
    targets = torch.randint(0, 65_536, (16_384,), device="cuda")
    warm = linear_cross_entropy(hidden[:128], weight, targets[:128])
    torch.autograd.grad(warm, weight)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    torch.cuda.synchronize()
    results = sum(x.numel() * x.element_size() for x in gradients)
    tile = 8192 * 8192 * 6 + 2 * 8192 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before - results <= 1.05 * (tile + hidden.numel() * 4)
