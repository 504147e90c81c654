"""The operators beside transformers' plain PyTorch functions for the same mixers: outputs, states and gradients.

Those compute in float32, ours here in float64. transformers is among the tests' requirements: where it is missing, or
has moved what is compared here, these tests fail and do not skip.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from longtrain.kernels import causal_conv1d, gated_delta_rule, linear_attention

ROWS, TOKENS, KEY_WIDTH, VALUE_WIDTH = 2, 100, 16, 12
Call = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]


def random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(inputs: dict[str, Tensor], ours: Call, theirs: Call) -> None:
    """Every result, and every input's gradient for random gradients of all results, to 1e-5 of its largest number."""
    found = []
    for call, dtype in ((ours, torch.float64), (theirs, torch.float32)):
        leaves = {name: x.to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}
        results = call(leaves)
        upstream = [random(*x.shape, seed=100 + n).to(x.dtype) for n, x in enumerate(results)]
        gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
        found.append([*results, *gradients])
    names = [f"result {n}" for n in range(len(found[0]) - len(inputs))] + [f"d{name}" for name in inputs]
    for name, mine, other in zip(names, *found, strict=True):
        assert mine.shape == other.shape, name
        assert (mine - other).abs().max() <= 1e-5 * mine.abs().max(), name


def delta_inputs(heads: int, groups: int, *, per_channel: bool) -> dict[str, Tensor]:
    k = random(ROWS, TOKENS, groups, KEY_WIDTH, seed=1)
    decays = (ROWS, TOKENS, heads, KEY_WIDTH) if per_channel else (ROWS, TOKENS, heads)
    return {
        "q": random(ROWS, TOKENS, groups, KEY_WIDTH, seed=0),
        "k": k / k.norm(dim=-1, keepdim=True),
        "v": random(ROWS, TOKENS, heads, VALUE_WIDTH, seed=2),
        "beta": random(ROWS, TOKENS, heads, seed=3).sigmoid(),
        "log_decay": -0.05 * random(*decays, seed=4).abs(),
        "initial_state": random(ROWS, heads, KEY_WIDTH, VALUE_WIDTH, seed=5),
    }


def our_delta_rule(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    given: dict[str, Any] = x
    out, state = gated_delta_rule(**given, return_state=True)
    assert state is not None
    return out, state


def their_delta_rule(rule: Callable[..., Any]) -> Call:
    def call(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        options = {"initial_state": x["initial_state"], "output_final_state": True}
        return rule(x["q"], x["k"], x["v"], g=x["log_decay"], beta=x["beta"], **options)

    return call


@pytest.mark.parametrize("rule", [qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule])
@pytest.mark.parametrize("groups", [4, 2])
def test_gated_delta_rule_of_qwen3_next(groups, rule):
    assert_same(delta_inputs(4, groups, per_channel=False), our_delta_rule, their_delta_rule(rule))


@pytest.mark.parametrize("rule", [kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention])
def test_delta_rule_with_a_gate_per_channel_of_kimi_linear(rule):
    assert_same(delta_inputs(4, 4, per_channel=True), our_delta_rule, their_delta_rule(rule))


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_state_space_scan_of_mamba2(groups):
    """x dt is v, B is k, C is q, A dt the log-decay; nothing is scaled."""
    heads = 4
    inputs = {
        "x": random(ROWS, TOKENS, heads, VALUE_WIDTH, seed=0),
        "dt": 0.3 * random(ROWS, TOKENS, heads, seed=1).abs(),
        "a": -random(heads, seed=2).abs(),
        "b": random(ROWS, TOKENS, groups, KEY_WIDTH, seed=3),
        "c": random(ROWS, TOKENS, groups, KEY_WIDTH, seed=4),
        "state": random(ROWS, heads, KEY_WIDTH, VALUE_WIDTH, seed=5),
    }

    def ours(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        values, decay = x["x"] * x["dt"][..., None], x["a"] * x["dt"]
        options: dict[str, Any] = {"scale": 1.0, "initial_state": x["state"], "return_state": True}
        out, state = linear_attention(x["c"], x["b"], values, decay, **options)
        assert state is not None
        return out, state

    def theirs(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = (x["x"], x["dt"], x["a"], x["b"], x["c"])
        options = {"chunk_size": 32, "initial_states": x["state"].transpose(2, 3), "return_final_states": True}
        out, state = mamba2.mamba2_chunk_scan(*given, **options)
        return out, state.transpose(2, 3)

    assert_same(inputs, ours, theirs)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution_of_mamba2(activation):
    inputs = {
        "x": random(ROWS, TOKENS, 6, seed=0),
        "weight": random(6, 4, seed=1),
        "bias": random(6, seed=2),
    }

    def ours(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (causal_conv1d(x["x"], x["weight"], x["bias"], activation=activation),)

    def theirs(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        out = mamba2.causal_conv1d_fn(x["x"].transpose(1, 2), x["weight"], x["bias"], activation=activation)
        return (out.transpose(1, 2),)

    assert_same(inputs, ours, theirs)
