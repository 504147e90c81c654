"""The gated delta rule's kernels, interpreted, against the float64 reference: forward and all gradients."""

from typing import Any

import pytest
import torch

from longtrain.kernels import gated_delta_rule
from longtrain.kernels.gated_delta_rule import configs
from longtrain.kernels.launching import Config
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.gated_delta_rule_cases import (
    GATES,
    PLACES,
    assert_float32_loses_little,
    assert_pieces_are_the_whole,
    own_gradients,
    problem,
    problem_of,
)
from tests.kernels.reach import assert_only_who_sees_it_is_reached, spoil
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)

AXES = {
    "gate": GATES,
    "strength": ["slow", "mixed"],
    "heads": [(2, 1), (1, 1)],  # H, G
    "widths": [(20, 35), (33, 16)],  # K, V
    "documents": [[40], [20, 20], [0, 1, 37, 0, 16]],  # without a 0 and alike: rows of a batch
    "states": ["neither", "both"],
    "betas": ["sigmoid", "any"],
    "chunk": [16, 32],
}


def possible(case: dict[str, Any]) -> bool:
    return not (case["gate"] == "none" and case["strength"] != "slow")


@cover(AXES, possible)
def test_kernels_are_the_reference(case, monkeypatch):
    case = dict(case)
    size = case.pop("chunk")
    monkeypatch.setattr(configs, "chunk_size", lambda *args, **widths: size)
    this = problem_of(case)
    assert_float32_loses_little(this.solve(torch.float32, "triton"), this)


@pytest.mark.parametrize("gate", GATES)
def test_the_largest_chunks(gate, monkeypatch):
    """As in half precision, where products with states are products of matrices."""
    monkeypatch.setattr(configs, "by_rows", lambda dtype: False)
    monkeypatch.setattr(configs, "chunk_size", lambda *args, **widths: 64)
    this = problem(gate, "mixed" if gate != "none" else "slow", heads=(1, 1), widths=(16, 16), documents=[100])
    assert_float32_loses_little(this.solve(torch.float32, "triton"), this)


@pytest.mark.parametrize(("gate", "cut"), [("none", 33), ("token", 0), ("token", 40), ("channel", 17)])
def test_two_pieces_joined_by_their_summaries_are_one(gate, cut):
    assert_pieces_are_the_whole(gate, cut, 1, "triton", torch.float32, tokens=50, heads=2, batch=1)


@pytest.mark.parametrize("gate", GATES)
def test_several_blocks_of_keys_and_values(gate, monkeypatch):
    def small(kernel: str, *args: Any, key_width: int, value_width: int) -> Config:
        carries = kernel in ("states", "dstates")
        constants = {"BK": 64 if carries else 16, "BV": 16}
        return Config({} if kernel == "invert" else constants, num_warps=4, num_stages=1)

    def fitting(kernel: str, *args: Any, **widths: int) -> Config:
        wanted = real(kernel, *args, **widths).constants
        given = small(kernel, *args, **widths)
        return Config({name: given.constants[name] for name in wanted}, num_warps=4, num_stages=1)

    real = configs.config
    monkeypatch.setattr(configs, "config", fitting)
    this = problem(gate, heads=(1, 1), widths=(40, 40), documents=[36])
    assert_float32_loses_little(this.solve(torch.float32, "triton"), this)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_all_may_be_forgotten(gate):
    this = problem(gate, "forgets", heads=(1, 1), documents=[40])
    got = this.solve(torch.float32, "triton")
    assert (got["dlog_decay"] == 0).all()
    assert_float32_loses_little(got, this)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("gate", GATES)
def test_nan_and_inf_reach_who_sees_them(gate, seed, monkeypatch):
    monkeypatch.setattr(configs, "chunk_size", lambda *args, **widths: 32)  # the inverse has several blocks
    this = problem(gate, heads=(3, 3), documents=[40, 50, 33])
    spoilt = spoil(this, PLACES + ([("log_decay", torch.nan)] if gate != "none" else []), seed=seed)
    assert_only_who_sees_it_is_reached(this, spoilt, "triton", torch.float32, spared=own_gradients(spoilt))


def test_nothing_to_do_and_results_repeat():
    for batch, documents in ((None, []), (None, [0, 0]), (3, [0]), (0, [5])):
        this = problem("token", documents=documents, batch=batch)
        got = this.solve(torch.float32, "triton")
        assert got["out"].shape == this.inputs["v"].shape
        assert torch.equal(got["dinitial_state"], this.gradients["state"])
    this = problem("token", heads=(2, 1), documents=[40])
    first, second = (this.solve(torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_strides_do_not_matter_and_only_some_inputs_need_gradients():
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 6, 40).permute(0, 3, 1, 2) * 0.4 for _ in range(2))
    v, beta = torch.randn(1, 1, 2, 7).expand(1, 40, 2, 7), torch.rand(2, 1, 40).permute(1, 2, 0)
    dout = torch.randn(1, 1, 2, 1).expand(1, 40, 2, 7)
    found = []
    for backend in ("triton", "torch"):
        leaf = v.detach().requires_grad_()
        out, state = gated_delta_rule(q, k, leaf, beta, backend=backend)
        assert state is None
        found.append((out.detach(), *torch.autograd.grad(out, leaf, dout)))
    for got, true in zip(*found, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


def test_what_it_cannot_do_is_refused():
    q = torch.randn(1, 4, 1, 257)
    v, beta = torch.randn(1, 4, 1, 8), torch.rand(1, 4, 1)
    with pytest.raises(ValueError, match="the Triton kernels take K up to 256, not 257"):
        gated_delta_rule(q, q, v, beta, backend="triton")
    with pytest.raises(ValueError, match="compute in float32, not in float64"):
        gated_delta_rule(v.double(), v.double(), v, beta, backend="triton")
