"""On a card: the Triton kernels of linear attention against the float64 reference, float32 and bfloat16."""

import pytest
import torch

from longtrain.kernels import linear_attention
from longtrain.kernels.linear_attention import configs
from tests.kernels.rounding import budget, relative, rounded_products, to_dtype, to_tf32
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
def test_halves_lose_what_rounded_operands_cost(decay, dtype, heads, widths, documents, monkeypatch):
    """bfloat16 goes into products as it is, float16 as TF32."""
    monkeypatch.setattr(configs, "SHORTEST_PART", 64)
    this = problem(decay, "slow", heads, widths, documents)
    inputs, gradients = (
        {name: x.to(dtype).float() for name, x in part.items()} for part in (this.inputs, this.gradients)
    )
    this = Problem(inputs, gradients, this.options)
    true, allowed = budget(this, dtype, to_dtype(dtype) if dtype == torch.bfloat16 else to_tf32)
    for name, error in relative(on_card(this).solve(dtype, "triton"), true).items():
        assert error <= allowed[name], (name, error, allowed[name])


def test_long_sequences_are_split_and_two_runs_are_equal():
    q, k, v, dout = (torch.randn(1, 20_000, 4, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = -1e-3 * torch.rand(1, 20_000, 4, device="cuda")

    def solve(backend: str) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, g)]
        out, _ = linear_attention(*leaves, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    once, again = solve("triton"), solve("auto")
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q, k, v, g)]

    def exact() -> dict[str, torch.Tensor]:
        out, _ = linear_attention(*leaves, backend="torch")
        found = [out.detach(), *torch.autograd.grad(out, leaves, dout.cpu().double())]
        return {str(n): x for n, x in enumerate(found)}

    true = exact()
    with rounded_products(to_dtype(torch.bfloat16)):
        lost = relative(exact(), true)
    for name, error in relative({str(n): x for n, x in enumerate(once)}, true).items():
        assert error <= 2 * lost[name] + torch.finfo(torch.bfloat16).eps, (name, error, lost[name])
