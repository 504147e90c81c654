"""On a card: the Triton kernels of linear attention against the float64 reference, float32 and bfloat16."""

import pytest
import torch

from longtrain.kernels import linear_attention
from longtrain.kernels.linear_attention import configs
from tests.kernels.test_linear_attention import Problem, errors, problem

pytestmark = pytest.mark.gpu
DECAYS = ["none", "head", "token", "channel"]
SHAPES = [  # heads, widths, documents
    ((2, 2), (64, 64), [300]),
    ((4, 2), (128, 128), [0, 1, 130, 0, 257, 64]),
    ((2, 1), (96, 200), [190, 15]),
    ((2, 2), (256, 256), [150]),
]


def on_card(this: Problem) -> Problem:
    """Its offsets stay on the CPU."""
    move = {name: {key: x.cuda() for key, x in getattr(this, name).items()} for name in ("inputs", "gradients")}
    return Problem(move["inputs"], move["gradients"], this.options)


@pytest.mark.parametrize(("heads", "widths", "documents"), SHAPES)
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_loses_what_the_reference_loses(decay, heads, widths, documents, monkeypatch):
    monkeypatch.setattr(configs, "SHORTEST_PART", 64)
    for strength in ("slow",) if decay == "none" else ("slow", "mixed"):
        this = on_card(problem(decay, strength, heads, widths, documents))
        true = this.solve(torch.float64, "reference")
        allowed = errors(this.solve(torch.float32, "reference"), true)
        for name, error in errors(this.solve(torch.float32, "triton"), true).items():
            assert error <= max(4 * allowed[name], 5e-6), (name, error, allowed[name])


@pytest.mark.parametrize(("heads", "widths", "documents"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", DECAYS)
def test_halves_lose_a_few_roundings(decay, dtype, heads, widths, documents, monkeypatch):
    """The torch path rounds only its results; the kernels also each operand of a product."""
    monkeypatch.setattr(configs, "SHORTEST_PART", 64)
    this = problem(decay, "slow", heads, widths, documents)
    this.inputs = {name: x.to(dtype) for name, x in this.inputs.items()}
    this = on_card(this)
    true = this.solve(torch.float64, "reference")
    allowed = errors(this.solve(dtype, "torch"), true)
    for name, error in errors(this.solve(dtype, "triton"), true).items():
        assert error <= 4 * max(allowed[name], torch.finfo(dtype).eps), (name, error, allowed[name])


def test_long_sequences_are_split_and_two_runs_are_equal():
    q, k, v, dout = (torch.randn(1, 20_000, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = -1e-3 * torch.rand(1, 20_000, 4, device="cuda")

    def solve(backend: str) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
        out, _ = linear_attention(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    once, again, other = solve("triton"), solve("auto"), solve("torch")
    for x, y, z in zip(once, again, other, strict=True):
        assert torch.equal(x, y)
        assert (x.double() - z.double()).norm() <= 2e-2 * z.double().norm()
