"""The causal convolution: the reference against torch's, the torch path and the operator against the reference."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.kernels import causal_conv1d, explain
from longtrain.kernels.causal_conv1d import convolve_backward, convolve_forward, operators, torch_impl
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.causal_conv1d_cases import AXES, assert_close_to_reference, errors, problem
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_gradients(call: Any, *tensors: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 4])
def test_it_is_the_convolution_of_torch(width, activation, backend):
    documents = [9, 20, 1]

    def torch_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        outputs = []
        for part in x.split(documents, 1):
            padded = F.pad(part.transpose(1, 2), (width - 1, 0))
            outputs.append(F.conv1d(padded, weight[:, None], bias, groups=len(bias)).transpose(1, 2))
        out = torch.cat(outputs, 1)
        return F.silu(out) if activation else out

    inputs, dout = (random(1, 30, 5), random(5, width), random(5)), random(1, 30, 5, seed=1)
    ends = torch.tensor([0, *documents]).cumsum(0)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, activation=activation, cu_seqlens=ends, backend=backend)

    for got, true in zip(
        with_gradients(ours, *inputs, dout=dout), with_gradients(torch_conv, *inputs, dout=dout), strict=True
    ):
        torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", [1, 11, 1000])  # tokens, about
@cover(AXES)
def test_torch_is_the_reference(case, tile, monkeypatch):
    this = problem(**case)
    monkeypatch.setattr(torch_impl, "_CPU_TILE", tile * case["batch"] * 5)
    assert_close_to_reference(this, torch.float64, "torch")
    assert_close_to_reference(this, torch.float32, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    assert_close_to_reference(problem(halo="whole"), dtype, "torch")


@pytest.mark.parametrize("cut", [0, 1, 3, 30, 59, 60])
@pytest.mark.parametrize("backend", ["torch"])
def test_pieces_with_halos_are_the_whole(backend, cut):
    """As ranks do it: the halo comes from the piece before, its gradient goes back there."""
    whole = problem(documents=[60], batch=2)
    true = whole.truth()
    inputs, dout = whole.in_dtype(torch.float64)
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    before = min(cut, 3)
    halo = torch.full((2, 1, 3, 5), torch.nan, dtype=x.dtype)
    halo[:, 0, 3 - before :] = x[:, cut - before : cut]
    counts = np.array([before])
    dx, outputs, sums = torch.zeros_like(x), [], []
    pieces = ((0, cut, {}), (cut, 60, {"halo": halo, "halo_counts": counts}))
    for start, stop, halos in pieces:
        options = {"activation": "silu", "backend": backend, **halos}
        given = (x[:, start:stop], weight, bias, np.array([0, stop - start]))
        outputs.append(convolve_forward(*given, **options))
        dpart, dweight, dbias, dhalo = convolve_backward(dout[:, start:stop], *given, **options)
        dx[:, start:stop] += dpart
        sums.append((dweight, dbias))
        if dhalo is not None:
            assert (dhalo[:, 0, : 3 - before] == 0).all()
            dx[:, cut - before : cut] += dhalo[:, 0, 3 - before :]
    got = {"out": torch.cat(outputs, 1), "dx": dx, "dweight": sums[0][0] + sums[1][0], "dbias": sums[0][1] + sums[1][1]}
    assert max(errors(got, true).values()) <= 1e-12


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_stays_in_its_document_and_channel_and_behind_its_token(bad):
    x, weight, bias, dout = random(1, 60, 5), random(5, 4), random(5), random(1, 60, 5, seed=1)
    ends = torch.tensor([0, 20, 40, 60])

    def solve(x: Tensor, dout: Tensor) -> list[Tensor]:
        def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return causal_conv1d(x, weight, bias, activation="silu", cu_seqlens=ends)

        return with_gradients(call, x, weight, bias, dout=dout)

    clean = solve(x, dout)
    x[0, 38, 2] = bad
    out, dx, dweight, dbias = solve(x, dout)
    seen = torch.zeros(60, 5, dtype=torch.bool)
    seen[38:40, 2] = True  # the fourth of its readers is in the next document
    assert not out[0][seen].isfinite().any() and torch.equal(out[0][~seen], clean[0][0][~seen])
    seen[35:38, 2] = True  # what its readers see, too
    assert torch.equal(dx[0][~seen], clean[1][0][~seen])
    others = torch.arange(5) != 2
    assert torch.equal(dweight[others], clean[2][others]) and torch.equal(dbias[others], clean[3][others])
    x = random(1, 60, 5)
    weight[1, 0] = bad  # a document's first three tokens have nothing to multiply it with
    out = solve(x, dout)[0][0]
    assert out[[0, 1, 2, 20, 22, 40]].isfinite().all() and not out[[3, 19, 23], 1].isfinite().any()


def test_strides_partial_gradients_and_several_dtypes():
    x = random(2, 6, 30).transpose(1, 2)
    weight = random(3, 6).t()
    dout = random(1, 6).expand(2, 30, 6)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return causal_conv1d(x, weight)

    strided = with_gradients(call, x, weight, dout=dout)
    plain = with_gradients(call, x.contiguous(), weight.contiguous(), dout=dout.contiguous())
    for a, b in zip(strided, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    one = weight.detach().requires_grad_()
    causal_conv1d(x, one).backward(dout)
    assert one.grad is not None and (one.grad - plain[2]).abs().max() <= 1e-12
    mixed = causal_conv1d(x.float(), weight)
    assert mixed.dtype == torch.float32
    # float64 throughout, but for the rounding of x and of y
    torch.testing.assert_close(mixed, causal_conv1d(x.float().double(), weight).float(), rtol=0, atol=0)


def test_nothing_to_do():
    for batch, tokens, ends in ((2, 0, None), (0, 5, None), (1, 0, [0]), (1, 0, [0, 0, 0])):
        x, weight, bias = random(batch, tokens, 5), random(5, 4), random(5)
        given = None if ends is None else torch.tensor(ends)
        for backend in ("torch", "reference"):
            out, dx, dweight, dbias = with_gradients(
                lambda x, w, b, given=given, backend=backend: (
                    causal_conv1d(x, w, b, cu_seqlens=given, backend=backend) + 0 * (w.sum() + b.sum())
                ),
                *(x, weight, bias),
                dout=random(batch, tokens, 5),
            )
            assert out.shape == dx.shape == x.shape and not dweight.any() and not dbias.any()


def test_autocast_changes_nothing_and_results_repeat():
    x, weight = random(1, 30, 5).float(), random(5, 4).float()
    plain = causal_conv1d(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_conv1d(x, weight), plain)
    assert "runs 'torch'" in explain("causal_conv1d")


@pytest.mark.parametrize("halo", ["none", "counted"])
@pytest.mark.parametrize("bias", [True, False])
def test_operator_is_sound(bias, halo):
    this = problem(halo=halo, bias=bias, documents=[9, 0, 21])
    inputs, dout = this.in_dtype(torch.float64)
    if halo == "counted":
        inputs["halo"].nan_to_num_()
    counts = this.options["halo_counts"]
    given = [inputs[name] for name in ("x", "weight", "bias", "halo")]
    leaves = [None if x is None else x.requires_grad_() for x in given]
    host = (torch.from_numpy(this.offsets), None if counts is None else torch.from_numpy(counts))
    options = {"activation": "silu", "backend": "torch"}
    torch.library.opcheck(operators.forward, (*leaves, *host), options)
    detached = [None if x is None else x.detach() for x in given]
    torch.library.opcheck(operators.backward, (dout, *detached, *host), options)


def test_it_compiles_whole():
    x, weight, bias, ends = random(1, 30, 5), random(5, 4), random(5), torch.tensor([0, 9, 9, 30])

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(2 * x, weight, bias, activation="silu", cu_seqlens=ends) * 3

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    dout = random(1, 30, 5, seed=1)
    got, true = (with_gradients(f, x, weight, bias, dout=dout) for f in (compiled, call))
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


X, WEIGHT = torch.zeros(1, 8, 5), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": X[0]}, "x: got shape (8, 5), expected [B, T, D]"),
        ({"x": X.long()}, "x: got dtype torch.int64"),
        ({"weight": WEIGHT.t()}, "weight: got shape (4, 5), expected [D, width] = [5, any >= 1]"),
        ({"weight": WEIGHT[:, :0]}, "weight: got shape (5, 0), expected [D, width] = [5, any >= 1]"),
        ({"bias": WEIGHT[:4, 0]}, "bias: got shape (4,), expected [D] = [5]"),
        ({"bias": torch.zeros(5, device="meta")}, "bias: got device meta, expected that of x, cpu"),
        ({"activation": "relu"}, "activation: got 'relu', expected None or 'silu'"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: got 0 ... 9, expected boundaries from 0 to 8"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 8])}, "cu_seqlens: got descending boundaries"),
        ({"x": X.expand(2, 8, 5), "cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens: got it with 2 batch rows"),
        ({"backend": "chunked"}, "backend: got 'chunked', expected for causal_conv1d on cpu: 'auto', 'torch'"),
        ({"backend": "triton"}, "backend: got 'triton' ("),
    ],
)
def test_bad_input_is_refused_by_name(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        causal_conv1d(**{"x": X, "weight": WEIGHT, **given})
