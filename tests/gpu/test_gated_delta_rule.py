"""The gated delta rule's Triton kernels on a card: against the float64 reference, in bfloat16, float16 and float32."""

from typing import Any

import pytest
import torch

from longtrain import debug
from longtrain.kernels import explain, gated_delta_rule
from tests.kernels.gated_delta_rule_cases import GATES, Problem, assert_pieces_are_the_whole, problem
from tests.kernels.rounding import budget, relative, to_dtype
from tests.kernels.test_linear_attention import errors

pytestmark = pytest.mark.gpu

WIDTHS = [(64, 64), (128, 128), (100, 200), (256, 256)]


def _like_a_model(gate: str, widths: tuple[int, int], strength: str = "slow") -> Problem:
    return problem(gate, strength, heads=(4, 2), widths=widths, documents=[200, 0, 1, 331], betas="sigmoid")


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_lose_what_rounded_operands_cost(dtype: torch.dtype, gate: str, widths: tuple[int, int]) -> None:
    this = _like_a_model(gate, widths).rounded(dtype)
    true, allowed = budget(this, dtype, to_dtype(dtype))
    for name, error in relative(this.solve(dtype, "triton", "cuda"), true).items():
        assert error <= allowed[name], (name, error, allowed[name])


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("gate", GATES)
def test_float32_loses_what_the_torch_path_loses(gate: str, widths: tuple[int, int]) -> None:
    this = _like_a_model(gate, widths)
    true = this.solve(torch.float64, "torch")
    lost = relative(this.solve(torch.float32, "torch"), true)
    for name, error in relative(this.solve(torch.float32, "triton", "cuda"), true).items():
        assert error <= max(4 * lost[name], 2e-6), (name, error, lost[name])


@pytest.mark.parametrize("strength", ["fast", "very fast", "mixed"])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_strong_decays(gate: str, strength: str) -> None:
    this = problem(gate, strength, heads=(4, 4), widths=(64, 64), documents=[300])
    true = this.solve(torch.float64, "torch")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton", "cuda"), true).items():
        assert error <= max(4 * allowed[name], 5e-6), (name, error)


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
