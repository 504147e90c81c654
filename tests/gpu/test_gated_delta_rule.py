"""The gated delta rule's Triton kernels on a card: against the float64 reference, in bfloat16, float16 and float32."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain import debug
from longtrain.kernels import explain, gated_delta_rule
from tests.kernels.gated_delta_rule_cases import GATES, Problem, assert_pieces_are_the_whole, problem
from tests.kernels.test_linear_attention import errors

pytestmark = pytest.mark.gpu

WIDTHS = [(64, 64), (128, 128), (100, 200), (256, 256)]


def _relative(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Norm of each tensor's error relative to its own; all numbers finite."""
    found = {}
    for name, x in true.items():
        y = got[name].double()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).norm() / x.norm().clamp_min(1e-30))
    return found


def _like_a_model(gate: str, widths: tuple[int, int], strength: str = "slow") -> Problem:
    return problem(gate, strength, heads=(4, 2), widths=widths, documents=[200, 0, 1, 331], betas="sigmoid")


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_are_the_reference(dtype: torch.dtype, gate: str, widths: tuple[int, int]) -> None:
    this = _like_a_model(gate, widths, "slow").rounded(dtype)
    true = this.solve(torch.float64, "torch")
    lost = _relative(this.solve(dtype, "torch"), true)
    found = _relative(this.solve(dtype, "triton", "cuda"), true)
    for name, error in found.items():
        # The torch path rounds results alone to bfloat16; the kernels also what goes into their products, of which
        # one number passes about six (u, W, the inverse, the states, P, the factors of q and k).
        budget = max(4 * lost[name], 2e-6) if dtype == torch.float32 else 12 * torch.finfo(dtype).eps / 2
        assert error <= budget, (name, error, lost[name])


@pytest.mark.parametrize("strength", ["fast", "very fast", "mixed"])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_strong_decays(gate: str, strength: str) -> None:
    this = problem(gate, strength, heads=(4, 4), widths=(64, 64), documents=[300])
    true = this.solve(torch.float64, "torch")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton", "cuda"), true).items():
        assert error <= max(4 * allowed[name], 5e-6), (name, error)


def test_float16() -> None:
    this = _like_a_model("token", (128, 128)).rounded(torch.float16)
    found = _relative(this.solve(torch.float16, "triton", "cuda"), this.solve(torch.float64, "torch"))
    assert max(found.values()) <= 12 * torch.finfo(torch.float16).eps / 2, found


@pytest.mark.parametrize("gate", GATES)
def test_two_runs_are_bitwise_equal(gate: str) -> None:
    this = _like_a_model(gate, (128, 128))
    first, second = (this.solve(torch.bfloat16, "triton", "cuda") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_auto_takes_the_kernels_and_values_are_checked_where_asked_for() -> None:
    assert "runs 'triton'" in explain("gated_delta_rule", device="cuda", dtype=torch.bfloat16)
    inputs: dict[str, Any] = {name: x.cuda() for name, x in problem("token").inputs.items() if name != "initial_state"}
    inputs["log_decay"] = inputs["log_decay"] + 1
    with debug.checks(), pytest.raises(ValueError, match="log_decay: got .*, expected no number above 0"):
        gated_delta_rule(**inputs)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_two_pieces_joined_by_their_summaries_are_one(backend: str, gate: str) -> None:
    assert_pieces_are_the_whole(gate, 99, 2, backend, torch.float32, device="cuda")
