"""The Triton kernels of linear attention in Triton's interpreter, float32, against the float64 reference.

Parts are made so short that every segment has several, as on a card for long ones.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.kernels import linear_attention
from longtrain.kernels.linear_attention import configs, torch_impl
from tests.kernels.reach import assert_only_who_sees_it_is_reached, spoil
from tests.kernels.test_linear_attention import Problem, errors, fill_empty_with_nan, problem  # noqa: F401 (a fixture)

DECAYS = ["none", "head", "token", "channel"]


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "SHORTEST_PART", 32)


def check(this: Problem) -> None:
    true = this.solve(torch.float64, "reference")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton"), true).items():
        assert error <= max(4 * allowed[name], 5e-6), (name, error, allowed[name])


# Slow decays carry states through every part, so that no transition may be lost; "mixed" has -50, -inf and 0 as well.
@pytest.mark.parametrize(("strength", "heads", "widths", "documents"), [
    ("slow", (2, 2), (9, 20), [70]),  # two value blocks, three parts, a ragged end
    ("mixed", (2, 1), (20, 5), [0, 1, 37, 0, 16]),
    ("slow", (1, 1), (70, 5), [40]),  # so wide that float32 goes token by token
])  # fmt: skip
@pytest.mark.parametrize("decay", DECAYS)
def test_triton_is_the_reference(decay, strength, heads, widths, documents):
    if decay != "none" or strength == "slow":
        check(problem(decay, strength, heads, widths, documents))


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_rows_of_a_batch_without_states(decay):
    check(problem(decay, "fast", (1, 1), (5, 5), [40], states="neither", batch=2))


@pytest.mark.parametrize("decay", DECAYS)
def test_stages_are_those_of_torch(decay):
    """Summaries of pieces, as ranks exchange them, and passes that go on from them; an empty segment too."""
    from longtrain.kernels.linear_attention import triton_impl

    this = problem(decay, "slow", (2, 1), (5, 9), [40], batch=1)
    x = this.inputs
    bounds = np.array([0, 17, 17, 40])
    state, dstate = torch.randn(1, 3, 2, 5, 9), torch.randn(1, 3, 2, 5, 9)

    def staged(module: Any, dtype: torch.dtype) -> list[Tensor | None]:
        q, k, v, dout = (t.to(dtype) for t in (x["q"], x["k"], x["v"], this.gradients["out"]))
        g = x["log_decay"].to(dtype) if decay != "none" else None
        forward = module.LinearAttentionForward(q, k, v, g, bounds, scale=0.7)
        found = [*forward.summaries()]
        forward.local()
        found += forward.finish(state.to(dtype))
        backward = module.LinearAttentionBackward(q, k, v, g, bounds, dout, scale=0.7)
        found += [backward.summaries(), backward.log_transition()]
        backward.local(state.to(dtype), need_decay_gradient=g is not None)
        found += backward.finish(state.to(dtype), dstate.to(dtype), need_decay_gradient=g is not None)
        return found

    for got, true in zip(staged(triton_impl, torch.float32), staged(torch_impl, torch.float64), strict=True):
        if true is None:
            assert got is None
        else:
            assert got is not None and got.shape == true.shape
            assert (got - true).abs().max() <= 2e-6 * true.abs().max().clamp_min(1e-30)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("decay", DECAYS)
def test_nan_and_inf_reach_who_sees_them(decay, seed):
    """A part has 32 tokens and a chunk 16; documents of several of both."""
    this = problem(decay, "slow", (2, 2), (5, 6), [37, 41, 40, 5])
    places = [("k", torch.nan), ("v", torch.inf), ("q", torch.nan), ("dout", torch.nan), ("initial_state", torch.inf)]
    places += [("k", -torch.inf), ("dstate", torch.nan)]
    if decay in ("token", "channel"):
        places.append(("log_decay", torch.nan))
    spoilt = spoil(this, places, seed=seed)
    spared = {}
    if decay in ("token", "channel"):  # a token's own k and v may reach the gradient of its decay
        spared["dlog_decay"] = ~torch.stack([spoilt.inputs[name].isfinite().all(-1)[0] for name in ("k", "v")]).all(0)
    assert_only_who_sees_it_is_reached(this, spoilt, "triton", torch.float32, spared=spared)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("decay", ["token", "channel"])
def test_two_bad_numbers_reach_no_more_than_the_decays_between_them(decay):
    this = problem(decay, "slow", (3, 3), (5, 6), [5, 50], states="neither")
    spoilt = Problem({name: x.clone() for name, x in this.inputs.items()}, this.gradients, this.options)
    between = torch.zeros(55, 3, dtype=torch.bool)
    for head, first, last in ((0, 10, 20), (1, 10, 45)):  # in one part, in two
        spoilt.inputs["q"][0, first, head, 1] = torch.nan
        spoilt.inputs["v"][0, last, head, 2] = torch.nan
        between[first : last + 1, head] = True
    assert_only_who_sees_it_is_reached(this, spoilt, "triton", torch.float32, spared={"dlog_decay": between})


def test_strides_do_not_matter_and_results_repeat():
    q, k = (torch.randn(1, 33, 2 * 5)[..., start : start + 5][:, :, None] for start in (0, 5))
    v = torch.randn(2, 33, 9).permute(1, 0, 2)[None]
    results = []
    for tensors in ((q, k, v), (q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, _ = linear_attention(*leaves, backend="triton")
        results.append([out, *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel()).view_as(out))])
    for again in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], again, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_nothing_to_do(decay):
    this = problem(decay, documents=[0, 0])
    got = this.solve(torch.float32, "triton")
    assert got["out"].numel() == 0 and torch.equal(got["state"], this.inputs["initial_state"])
    assert torch.equal(got["dinitial_state"], this.gradients["state"])
