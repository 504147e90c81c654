"""The Triton kernels of `linear_cross_entropy` in Triton's interpreter: whole problems in several tiles and blocks."""

from collections.abc import Iterator

import pytest
import torch

from longtrain.kernels.launching import Config
from longtrain.kernels.linear_cross_entropy import configs
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.linear_cross_entropy_cases import errors, problem

AXES = {
    "sizes": [(20, 24, 130), (50, 5, 37), (3, 16, 1)],  # N, D, vocabulary
    "ignored": ["none", "some", "all"],
    "reduction": ["sum", "mean", "none"],
    "z_loss": [0.0, 0.05],
    "softcap": [None, 4.0],
    "tile": [(16, 48), (1000, 1000)],  # tokens, vocabulary
    "block": [32, None],  # of the kernels; None: what ships
}


@pytest.fixture(autouse=True)
def fill_empty_with_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@cover(AXES)
def test_triton_is_the_reference(case, monkeypatch):
    case = dict(case)
    tile, block = case.pop("tile"), case.pop("block")
    monkeypatch.setattr(configs, "tile_sizes", lambda width: tile)
    if block is not None:
        small = Config({"BLOCK": block}, num_warps=4, num_stages=1)
        monkeypatch.setattr(configs, "config", lambda architecture, kernel: small)
    this = problem(**case)
    true = this.solve(torch.float64, "reference")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton"), true).items():
        assert error <= max(4 * allowed[name], 1e-6), name


def test_a_token_that_is_not_a_number_stays_alone(monkeypatch):
    monkeypatch.setattr(configs, "tile_sizes", lambda width: (16, 48))
    this = problem((20, 8, 100), ignored="none", z_loss=0.1)
    clean = this.solve(torch.float32, "triton")
    others = torch.arange(20) != 5
    for bad in (torch.nan, torch.inf):
        this.hidden[5, 2] = bad
        got = this.solve(torch.float32, "triton")
        assert not got["loss"][5].isfinite() and not got["dhidden"][5].isfinite().any()
        assert torch.equal(got["loss"][others], clean["loss"][others])
        assert torch.equal(got["dhidden"][others], clean["dhidden"][others])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits_beyond_what_exp_holds(softcap):
    this = problem((8, 6, 90), softcap=softcap)
    this.hidden *= 300
    true = this.solve(torch.float64, "reference")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton"), true).items():
        assert error <= max(4 * allowed[name], 1e-6), name


def test_float64_is_refused():
    with pytest.raises(ValueError, match="backend: got 'triton' .*float64"):
        problem().solve(torch.float64, "triton")
