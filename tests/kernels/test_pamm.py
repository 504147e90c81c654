"""The projection that keeps few rows: against its reference, against the exact gradient, and what it saves."""

import pytest
import torch
from torch import Tensor

from longtrain.kernels.pamm import operators, pamm_linear, reference
from longtrain.layers import MIXERS, LayerPlace
from longtrain.layers.pamm import PammLinear
from longtrain.parallel import SequenceShard


def inputs(tokens: int = 70, *, kinds: int | None = None, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, tokens / 2, 9], weight [5, 9] and dy; kinds: rows of x are multiples of so many vectors, and some noise."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(tokens, 9)
    if kinds is not None:
        of_kind = torch.arange(tokens) % kinds
        x = normal(kinds, 9)[of_kind] * normal(tokens, 1) + noise * x
    return x.view(2, -1, 9), normal(5, 9), normal(2, tokens // 2, 5)


def gradients(x: Tensor, weight: Tensor, dy: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = pamm_linear(x, weight, rows)
    dx, dweight = torch.autograd.grad(y, (x, weight), dy)
    return y.detach(), dx, dweight


@pytest.mark.parametrize("kept", [1, 6, 70])
def test_is_the_reference_and_exact_but_for_the_weights(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "CHUNK", 16)
    x, weight, dy = inputs()
    x[0, 3] = 0  # like nothing
    rows = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:kept]
    y, dx, dweight = gradients(x, weight, dy, rows)
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(dx, dy @ weight)
    wanted = reference.weight_gradient(dy.flatten(0, 1), *reference.summary(x.flatten(0, 1), rows))
    torch.testing.assert_close(dweight, wanted)
    if kept == 70:  # every token stands for itself
        torch.testing.assert_close(dweight, dy.flatten(0, 1).t() @ x.flatten(0, 1))


def test_exact_where_tokens_are_parallel_to_kept_ones_and_better_than_dropping_where_nearly() -> None:
    for noise, allowed in ((0.0, 1e-10), (0.1, 0.15)):
        x, weight, dy = inputs(2000, kinds=8, noise=noise)
        rows = torch.arange(8, 40)
        exact = dy.flatten(0, 1).t() @ x.flatten(0, 1)
        dropped = dy.flatten(0, 1)[rows].t() @ x.flatten(0, 1)[rows] * (2000 / 32)
        error = (gradients(x, weight, dy, rows)[2] - exact).norm() / exact.norm()
        assert error < allowed < 0.2 * (dropped - exact).norm() / exact.norm()


def test_what_is_saved_does_not_grow_with_the_width() -> None:
    layer, saved = PammLinear(64, 96, kept=8, seed=3), {}

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x = torch.randn(1, 500, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = layer(x)
    assert sum(saved.values()) == 4 * (64 * 96 + 8 * 64 + 2 * 500)  # weight, kept rows, index and scale
    first = torch.autograd.grad(y, layer.weight, y.detach())[0]
    again = layer(x)
    assert torch.equal(torch.autograd.grad(again, layer.weight, again.detach())[0], first)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))
    small = torch.randn(8, 64)  # no more tokens than are kept
    assert torch.equal(torch.autograd.grad(layer(small).sum(), layer.weight)[0][0], small.sum(0))


def test_softmax_layers_project_with_it() -> None:
    found = {}
    for pamm in (None, 20, 60):
        torch.manual_seed(0)
        mixer = MIXERS["softmax"](MIXERS["softmax"].Config(heads=2, pamm=pamm), LayerPlace(width=16, index=0, depth=1))
        x = torch.randn(1, 60, 16, requires_grad=True)
        y = mixer(x, SequenceShard(length=60))
        found[pamm] = [y, *torch.autograd.grad(y, [x, *mixer.parameters()], torch.cos(y.detach()))]
    for exact, same, few in zip(*(found[pamm] for pamm in (None, 60, 20)), strict=True):
        assert torch.equal(exact, same)  # no more tokens than are kept
        if exact.shape == (3 * 16, 16):
            assert 0 < (few - exact).norm() < exact.norm()
        else:
            torch.testing.assert_close(few, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeps_the_rules_of_registered_operators(dtype: torch.dtype) -> None:
    x, weight, dy = (t.to(dtype) for t in inputs())
    rows = torch.tensor([3, 50, 69])
    _, kept, index, scale = operators.forward(x, weight, rows)
    torch.library.opcheck(operators.backward, (dy, weight, kept, index, scale))
    torch.library.opcheck(operators.forward, (x.requires_grad_(), weight.requires_grad_(), rows))
    assert all(g.dtype == dtype for g in gradients(x.detach(), weight.detach(), dy, rows))


def test_no_tokens() -> None:
    x, weight = torch.zeros(1, 0, 9), torch.randn(5, 9)
    y, dx, dweight = gradients(x, weight, torch.zeros(1, 0, 5), torch.tensor([0]))
    assert y.shape == (1, 0, 5) and dx.shape == x.shape and torch.equal(dweight, torch.zeros(5, 9))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x": torch.ones(3, 9, dtype=torch.int64)}, r"x: got torch.int64 \(3, 9\), expected a floating"),
        ({"weight": torch.ones(5, 8)}, r"weight: got shape \(5, 8\), expected \[O, D\]"),
        ({"weight": torch.ones(5, 9, dtype=torch.float64)}, "weight: got dtype torch.float64, expected that of x"),
        ({"rows": torch.tensor([0.0])}, r"rows: got torch.float32 \(1,\), expected an int64 tensor"),
        ({"rows": torch.zeros(0, dtype=torch.int64)}, r"rows: got torch.int64 \(0,\)"),
        ({"rows": [0]}, "rows: got list"),
    ],
)
def test_refusals(wrong: dict[str, Tensor], message: str) -> None:
    given = {"x": torch.ones(3, 9), "weight": torch.ones(5, 9), "rows": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        pamm_linear(**given | wrong)
