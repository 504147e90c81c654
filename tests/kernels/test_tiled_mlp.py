"""The tiled half of a block: the operator against the reference, for any tile, and what it holds meanwhile."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longtrain.kernels import linear_cross_entropy, tiled_mlp
from longtrain.kernels.tiled_mlp import operators
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)
from tests.memory.allocations import allocated

WIDTH, HIDDEN = 8, 12


def _inputs(tokens: tuple[int, ...], dtype: torch.dtype, width: int = WIDTH, hidden: int = HIDDEN) -> list[Tensor]:
    """x, norm, gate_up, down, and the gradient of the result."""
    seeded = torch.Generator().manual_seed(1)
    shapes = ((*tokens, width), (width,), (2 * hidden, width), (width, hidden), (*tokens, width))
    return [torch.randn(shape, generator=seeded, dtype=torch.float64).to(dtype) for shape in shapes]


def _with_gradients(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    *given, dy = inputs
    leaves = [x.detach().requires_grad_() for x in given]
    y = tiled_mlp(*leaves, eps=1e-3, **options)  # type: ignore[misc]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("tile", [1, 4, 7, 14, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_is_the_reference(dtype: torch.dtype, tile: int) -> None:
    inputs = _inputs((2, 7), dtype)
    true = _with_gradients([x.double() for x in inputs], tile=1, backend="reference")
    lost = _with_gradients(inputs, tile=1, backend="reference")
    for found, own, exact in zip(_with_gradients(inputs, tile=tile), lost, true, strict=True):
        assert found.dtype == dtype
        assert _error(found, exact) <= 3 * _error(own, exact) + 8 * torch.finfo(torch.float64).eps


def test_no_token_at_all_gives_gradients_of_zero() -> None:
    y, dx, *dweights = _with_gradients(_inputs((1, 0), torch.float32), tile=4)
    assert y.shape == dx.shape == (1, 0, WIDTH)
    assert [x.shape for x in dweights] == [(WIDTH,), (2 * HIDDEN, WIDTH), (WIDTH, HIDDEN)]
    assert not any(x.any() for x in dweights)


def test_sums_over_many_tiles_lose_nothing_in_half_precision() -> None:
    inputs = _inputs((1, 512), torch.bfloat16)
    true = _with_gradients([x.double() for x in inputs], tile=512)
    once = _with_gradients(inputs, tile=512)
    for found, own, exact in zip(_with_gradients(inputs, tile=2), once, true, strict=True):
        assert _error(found, exact) <= 1.5 * _error(own, exact)


def test_weights_get_one_gradient_each() -> None:
    leaves = [x.requires_grad_() for x in _inputs((1, 9), torch.float32)[:4]]
    counts = [0] * 4

    def count(n: int) -> None:
        counts[n] += 1

    for n, leaf in enumerate(leaves):
        leaf.register_post_accumulate_grad_hook(lambda _, n=n: count(n))
    tiled_mlp(*leaves, tile=2).sum().backward()  # type: ignore[misc]
    assert counts == [1] * 4


def _extra_of_mlp(tokens: int) -> int:
    """Bytes beyond inputs, result and gradients, at the peak of forward and backward."""
    inputs = _inputs((1, tokens), torch.float32, 32, 96)
    made = allocated(lambda: _with_gradients(inputs, tile=512))
    return made.peak - made.held


def _extra_of_loss(tokens: int) -> int:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 32, requires_grad=True)
    weight, targets = torch.randn(4096, 32, requires_grad=True), torch.randint(4096, (tokens,))

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, targets)
        return [loss, *torch.autograd.grad(loss, [hidden, weight])]

    made = allocated(run)
    return made.peak - made.held


SHORT, LONG = 8192, 32768


def test_the_extra_memory_of_the_mlp_does_not_grow_with_the_tokens() -> None:
    assert _extra_of_mlp(LONG) <= 1.01 * _extra_of_mlp(SHORT)


def test_that_of_the_loss_grows_by_a_few_numbers_for_each_token_and_by_no_logits() -> None:
    # Targets, losses, lse and their gradients: vectors. A whole row of logits would be 16,384 bytes.
    assert _extra_of_loss(LONG) - _extra_of_loss(SHORT) <= 100 * (LONG - SHORT)


@pytest.mark.full
def test_the_extra_memory_is_the_same_at_128_thousand_tokens() -> None:
    assert _extra_of_mlp(131072) <= 1.01 * _extra_of_mlp(SHORT)
    assert _extra_of_loss(131072) - _extra_of_loss(SHORT) <= 100 * (131072 - SHORT)


def test_fake_tensors_have_the_shapes_of_real_ones() -> None:
    real = _with_gradients(_inputs((2, 3), torch.bfloat16), tile=2)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        leaves = [mode.from_tensor(x).requires_grad_() for x in _inputs((2, 3), torch.bfloat16)[:4]]
        y = tiled_mlp(*leaves, tile=2)  # type: ignore[misc]
        fake = [y, *torch.autograd.grad(y.sum(), leaves)]
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


def test_the_operators_keep_what_they_register() -> None:
    inputs = [x.requires_grad_() for x in _inputs((1, 5), torch.float32)[:4]]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.forward, tuple(inputs), {"eps": 1e-6, "tile": 2}, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 0}, "tile: got 0"),
        ({"tile": True}, "tile: got True"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"backend": "triton"}, "backend: got 'triton', expected for tiled_mlp on cpu"),
    ],
)
def test_options_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiled_mlp(*_inputs((1, 3), torch.float32)[:4], **({"tile": 2} | change))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("index", "given", "message"),
    [
        (0, torch.zeros(1, 3, WIDTH, dtype=torch.int64), "x: got dtype torch.int64"),
        (1, torch.zeros(7), r"norm: got shape \(7,\)"),
        (2, torch.zeros(HIDDEN, WIDTH), r"gate_up: got shape \(12, 8\), expected \[2 M, D\] = \[24, 8\]"),
        (3, torch.zeros(7, HIDDEN), r"down: got shape \(7, 12\)"),
        (3, torch.zeros(WIDTH, HIDDEN, dtype=torch.bfloat16), "down: got dtype torch.bfloat16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(index: int, given: Tensor, message: str) -> None:
    inputs = _inputs((1, 3), torch.float32)[:4]
    inputs[index] = given
    with pytest.raises(ValueError, match=message):
        tiled_mlp(*inputs, tile=2)  # type: ignore[misc]
