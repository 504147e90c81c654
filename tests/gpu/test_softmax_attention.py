"""On one card: the Triton kernels and the vendors' against the float64 reference, and merged sets of keys."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.kernels import softmax_attention
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.softmax_attention import attention_backward, attention_forward, configs, operators
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.dense import offsets

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(size: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and the gradients of out and lse, rounded to dtype; size: B, T, H, G, K, V."""
    batch, tokens, heads, groups, width, value_width = size
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = ((heads, width), (groups, width), (groups, value_width), (heads, value_width), (heads,))
    made = [torch.randn(batch, tokens, *x, generator=generator, device="cuda") for x in sizes]
    made = [x.to(dtype) for x in made[:4]] + made[4:]
    return made[:3], made[3:]


def solve(
    given: list[Tensor], upstream: list[Tensor], dtype: torch.dtype, backend: str, **options: Any
) -> list[Tensor]:
    leaves = [x.to(dtype).requires_grad_() for x in given]
    out, lse = softmax_attention(*leaves, backend=backend, **options)
    assert lse is not None
    used = [out, lse][: len(upstream)]
    return [out, lse, *torch.autograd.grad(used, leaves, [x.to(y.dtype) for x, y in zip(upstream, used, strict=True)])]


def lost(got: list[Tensor], true: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, true, strict=True)]


def check(got: list[Tensor], true: list[Tensor], rival: list[Tensor]) -> None:
    for name, error, allowed in zip(("out", "lse", "dq", "dk", "dv"), lost(got, true), lost(rival, true), strict=True):
        # Weights and their gradients are rounded to halves before they enter a product: that is the kernels' own loss.
        budget = max(4 * allowed, 1e-5) if got[0].dtype == torch.float32 else max(4 * allowed, 1e-4)
        assert error <= budget, (name, error, allowed)


@cover(
    {
        "dtype": DTYPES,
        "width": [(64, 64), (128, 128), (256, 256), (80, 40), (192, 128)],
        "mask": [
            {},
            {"causal": False},
            {"window": (300, 0)},
            {"cu_seqlens": torch.from_numpy(offsets([100, 0, 513, 411]))},
            {"causal": False, "window": (50, 70), "softcap": 4.0},
            {"softcap": 20.0, "cu_seqlens": torch.from_numpy(offsets([7, 600, 417]))},
        ],
        "heads": [(4, 1), (4, 4)],
    }
)
def test_kernels_are_the_reference(case) -> None:
    given, upstream = inputs((1, 1024, *case["heads"], *case["width"]), case["dtype"])
    true = solve(given, upstream, torch.float64, "torch", **case["mask"])
    rival = solve(given, upstream, case["dtype"], "torch", **case["mask"])
    check(solve(given, upstream, case["dtype"], "triton", **case["mask"]), true, rival)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("vendor", ["flash", "cudnn"])
def test_vendors_are_the_reference(vendor: str, causal: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "vendor", lambda **_: vendor)
    given, upstream = inputs((2, 700, 4, 2, width, width), torch.bfloat16)
    for part in (upstream, upstream[:1]):  # with a gradient of lse, Triton's backward takes over
        true = solve(given, part, torch.float64, "torch", causal=causal)
        rival = solve(given, part, torch.bfloat16, "torch", causal=causal)
        check(solve(given, part, torch.bfloat16, "auto", causal=causal), true, rival)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_with_those_who_see_it(backend: str, place: int) -> None:
    given, upstream = inputs((1, 512, 4, 2, 64, 64), torch.bfloat16)
    clean = solve(given, upstream[:1], torch.bfloat16, "triton")
    given[place] = given[place].clone()
    given[place][0, 300, 1, 5] = torch.nan
    dirty = solve(given, upstream[:1], torch.bfloat16, backend)
    tolerance = 0.0 if backend == "triton" else 2e-2
    for x, y in zip(dirty[:3], clean[:3], strict=True):  # out, lse, dq of queries before it
        torch.testing.assert_close(x[:, :300], y[:, :300], rtol=tolerance, atol=tolerance)
    assert dirty[0][:, 300].isnan().any() and all(x[:, :, :1].isfinite().all() for x in dirty[3:])


def test_sets_of_keys_merge_and_runs_repeat() -> None:
    given, upstream = inputs((1, 1000, 4, 2, 128, 128), torch.bfloat16)
    q, k, v = given
    dout, dlse = upstream[0].float(), upstream[1]
    scale = 128**-0.5
    results = []
    for _ in range(2):
        out = torch.zeros(q.shape, device="cuda")
        lse = torch.full(q.shape[:3], -torch.inf, device="cuda")
        options: dict[str, Any] = {"scale": scale, "softcap": None, "backend": "triton"}
        parts = []
        for start, stop in ((0, 333), (333, 340), (340, 1000)):
            hi = np.clip(np.arange(1, 1001) - start, 0, stop - start).astype(np.int64)
            parts.append((slice(start, stop), KeyIntervals(np.zeros_like(hi), hi, stop - start)))
        for keys, intervals in parts:
            attention_forward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **options)
        dq, dk, dv = (torch.zeros(x.shape, device="cuda") for x in (q, k, v))
        for keys, intervals in parts:
            into = {"dq": dq, "dk": dk[:, keys], "dv": dv[:, keys]}
            final = {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
            attention_backward(q, k[:, keys], v[:, keys], intervals, **final, **into, **options)
        results.append([out, lse, dq, dk, dv])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    true = solve(given, upstream, torch.float64, "torch")
    check(results[0], true, solve(given, upstream, torch.bfloat16, "torch"))


def test_more_than_two_to_the_31_elements() -> None:
    tokens = 2**31 // (32 * 128) + 1024
    if torch.cuda.mem_get_info()[0] < 6 * tokens * 32 * 128 * 2:
        pytest.skip("needs 26 GB of free memory")
    q, k, v = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options: dict[str, Any] = {"causal": True, "left": 64, "right": None, "scale": 0.1, "softcap": None}
    out, _ = operators.forward(q, k, v, None, None, **options, backend="triton", wide=False)
    tail = [x[:, -256:].contiguous() for x in (q, k, v)]
    true, _ = softmax_attention(*(x.double() for x in tail), window=(64, 0), scale=0.1, backend="torch")
    assert float((out[:, -128:].double() - true[:, -128:]).norm() / true[:, -128:].norm()) < 1e-2
