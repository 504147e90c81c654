"""RMS norm, rotary embedding and the gate of SwiGLU: operators against references, and these against plain PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from longtrain.kernels import explain, rms_norm, rotary, swiglu
from longtrain.kernels.rms_norm import operators as norms
from longtrain.kernels.rms_norm import torch_impl as norm_tiles
from longtrain.kernels.rotary import operators as rotations
from longtrain.kernels.rotary import torch_impl as rotary_tiles
from longtrain.kernels.swiglu import operators as gates
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)

Call = Callable[..., Tensor]
POSITIONS = torch.tensor([0, 1, 2, 1_000_003, 0, 7, 4096])


def _norm(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return rms_norm(x, weight, eps=1e-3, **options)


def _rotary(x: Tensor, **options: Any) -> Tensor:
    return rotary(x, POSITIONS, base=1000.0, **options)


CASES: dict[str, tuple[Call, list[tuple[int, ...]]]] = {
    "norm": (_norm, [(2, 7, 3, 8), (8,)]),
    "norm without weight": (lambda x, **options: rms_norm(x, eps=1e-3, **options), [(2, 7, 8)]),
    "rotary": (_rotary, [(2, 7, 3, 8)]),
    "swiglu": (swiglu, [(2, 7, 8)]),
}


def _inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    seeded = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=seeded, dtype=torch.float64).to(dtype) for shape in CASES[name][1]]


def _with_gradients(call: Call, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = call(*leaves, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def _error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("tile", [1, 50, 2**17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_torch_is_the_reference(name: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (norm_tiles, rotary_tiles):
        monkeypatch.setattr(module, "_CPU_TILE", tile)
    call, inputs = CASES[name][0], _inputs(name, dtype)
    true = _with_gradients(call, [x.double() for x in inputs], backend="reference")
    lost = _with_gradients(call, inputs, backend="reference")
    for found, own, exact in zip(_with_gradients(call, inputs, backend="torch"), lost, true, strict=True):
        assert found.dtype == own.dtype == dtype
        assert _error(found, exact) <= 3 * _error(own, exact) + 8 * torch.finfo(torch.float64).eps


def test_the_references_are_plain_pytorch() -> None:
    x, weight = _inputs("norm", torch.float64)
    torch.testing.assert_close(_norm(x, weight, backend="reference"), F.rms_norm(x, (8,), weight, 1e-3))
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x, backend="reference"), F.silu(gate) * up)
    turned = _rotary(x, backend="reference")
    for i in range(4):  # each pair of channels by a rotation matrix
        angle = POSITIONS.double() * 1000.0 ** (-2 * i / 8)
        for t in range(7):
            c, s = angle[t].cos(), angle[t].sin()
            pair = torch.stack((x[:, t, :, i], x[:, t, :, i + 4]), -1)
            wanted = pair @ torch.stack((torch.stack((c, s)), torch.stack((-s, c))))
            torch.testing.assert_close(torch.stack((turned[:, t, :, i], turned[:, t, :, i + 4]), -1), wanted)


def test_dtypes_may_differ_and_one_in_float64_makes_all_so() -> None:
    x, weight = _inputs("norm", torch.float64)
    half = x.bfloat16()
    found = _with_gradients(_norm, [half, weight])
    true = _with_gradients(_norm, [half.double(), weight], backend="reference")
    assert [y.dtype for y in found] == [torch.bfloat16, torch.bfloat16, torch.float64]
    assert _error(found[2], true[2]) < 1e-2 and torch.equal(found[0], true[0].bfloat16())
    under = _norm(x.float(), weight.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_norm(x.float(), weight.float()), under)


def test_views_and_nothing_at_all_are_taken() -> None:
    x = torch.randn(3, 7, 2, 16, dtype=torch.float64)[..., ::2].transpose(0, 2)  # [2, 7, 3, 8], no plain layout
    for name in ("norm", "rotary", "swiglu"):
        call, rest = CASES[name][0], _inputs(name, torch.float64)[1:]
        for found, true in zip(
            _with_gradients(call, [x, *rest]), _with_gradients(call, [x.contiguous(), *rest]), strict=True
        ):
            torch.testing.assert_close(found, true, rtol=1e-14, atol=1e-14)
    empty = torch.empty(1, 0, 8, requires_grad=True)
    for y in (rms_norm(empty, torch.ones(8, requires_grad=True)), swiglu(empty)):
        assert y.shape[1] == 0
        y.sum().backward()
    none = rotary(torch.empty(1, 0, 2, 8), torch.empty(0, dtype=torch.int64))
    assert none.shape == (1, 0, 2, 8)


def test_nan_stays_with_its_token() -> None:
    for name in CASES:
        inputs = _inputs(name, torch.float64)
        clean = _with_gradients(CASES[name][0], inputs)
        inputs[0][:, 3] = torch.nan
        dirty = _with_gradients(CASES[name][0], inputs)
        others = [0, 1, 2, 4, 5, 6]
        for found, true in zip(dirty[:2], clean[:2], strict=True):
            assert torch.equal(found[:, others], true[:, others]), name


@pytest.mark.parametrize("name", CASES)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    real = _with_gradients(CASES[name][0], _inputs(name, torch.bfloat16))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        inputs = [mode.from_tensor(x).requires_grad_() for x in _inputs(name, torch.bfloat16)]
        y = CASES[name][0](*inputs)
        fake = [y, *torch.autograd.grad(y.sum(), inputs)]
    assert [(x.shape, x.dtype) for x in fake] == [(x.shape, x.dtype) for x in real]


def test_the_operators_keep_what_they_register() -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    x, weight = (y.requires_grad_() for y in _inputs("norm", torch.float32))
    for given in (weight, None):
        torch.library.opcheck(norms.forward, (x, given), {"eps": 1e-6}, test_utils=checks)
    options = {"base": 1e4, "inverse": False}
    torch.library.opcheck(rotations.forward, (x, POSITIONS), options, test_utils=checks)
    torch.library.opcheck(gates.forward, (x,), test_utils=checks)


def test_rotation_is_differentiable_again() -> None:
    x = _inputs("rotary", torch.float64)[0][:1, :2].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: rotary(x, POSITIONS[:2]), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rms_norm(x, torch.ones(7)), r"weight: got shape \(7,\)"),
        (lambda x: rms_norm(x, eps=-1.0), "eps: got -1.0"),
        (lambda x: rms_norm(x.long()), "x: got dtype torch.int64"),
        (lambda x: rms_norm(x, backend="triton"), "backend: got 'triton', expected for rms_norm on cpu"),
        (lambda x: rms_norm(torch.zeros(3, 0)), r"x: got shape \(3, 0\)"),
        (lambda x: rotary(x[..., :7], POSITIONS), "even head width, got K = 7"),
        (lambda x: rotary(x, POSITIONS[:3]), r"positions: got torch.int64 of shape \(3,\)"),
        (lambda x: rotary(x, POSITIONS, base=0.0), "base: got 0.0"),
        (lambda x: rotary(x[0], POSITIONS), r"x: got shape \(7, 3, 8\)"),
        (lambda x: swiglu(x[..., :7]), r"gate_up: got shape .* 2 M"),
        (lambda x: swiglu(torch.zeros(())), r"gate_up: got shape \(\)"),
    ],
)
def test_what_they_cannot_take_is_refused(call: Call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(_inputs("norm", torch.float32)[0])


def test_explain_knows_them() -> None:
    for name in ("rms_norm", "rotary", "swiglu"):
        assert "runs 'torch'" in explain(name) and "'reference'" in explain(name)
