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
from tests.kernels.dense import dense_mask, offsets

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


def dense(
    given: list[Tensor],
    upstream: list[Tensor],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    **mask: Any,
) -> list[Tensor]:
    """out, lse, dq, dk, dv as a plain computation on [B, H, T, S] in the inputs' dtype finds them: what that loses.

    lse, which the operator promises in float32, from scores in float32. mask: causal, window, cu_seqlens.
    """
    q, k, v = (x.detach().clone().requires_grad_() for x in given)
    queries, share = q.shape[1], q.shape[2] // k.shape[2]
    ends = offsets([queries]) if (given_ends := mask.get("cu_seqlens")) is None else given_ends.numpy()
    limits = {"causal": mask.get("causal", True), "window": mask.get("window")}
    seen = torch.from_numpy(dense_mask(**limits, query_offsets=ends, key_offsets=ends)).to(q.device)

    def scores(q: Tensor, k: Tensor) -> Tensor:
        found = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(share, 2))
        found = found * (q.shape[3] ** -0.5 if scale is None else scale)
        found = found if softcap is None else softcap * torch.tanh(found / softcap)
        return found.masked_fill(~seen, -torch.inf)

    state = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.einsum("bhts,bshv->bthv", scores(q, k).softmax(-1), v.repeat_interleave(share, 2))
    lse = scores(q.to(state), k.to(state)).logsumexp(-1).transpose(1, 2)
    used = [out, lse][: len(upstream)]
    found = torch.autograd.grad(used, [q, k, v], [x.to(y.dtype) for x, y in zip(upstream, used, strict=True)])
    return [out, lse, *found]


def check(got: list[Tensor], true: list[Tensor], plain: list[Tensor]) -> None:
    """Loses at most four times what the plain computation in the same dtype loses on the same input."""
    names = ("out", "lse", "dq", "dk", "dv")[: len(got)]
    for name, error, allowed in zip(names, lost(got, true), lost(plain, true), strict=True):
        assert error <= 4 * allowed, (name, error, allowed)


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
    plain = dense(given, upstream, **case["mask"])
    check(solve(given, upstream, case["dtype"], "triton", **case["mask"]), true, plain)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("vendor", ["flash", "cudnn"])
def test_vendors_are_the_reference(vendor: str, causal: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "vendor", lambda **_: vendor)
    given, upstream = inputs((2, 700, 4, 2, width, width), torch.bfloat16)
    for part in (upstream, upstream[:1]):  # with a gradient of lse, Triton's backward takes over
        true = solve(given, part, torch.float64, "torch", causal=causal)
        check(solve(given, part, torch.bfloat16, "auto", causal=causal), true, dense(given, part, causal=causal))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_stays_with_those_who_see_it(backend: str, place: int) -> None:
    given, upstream = inputs((1, 512, 4, 2, 64, 64), torch.bfloat16)
    true = solve(given, upstream[:1], torch.float64, "torch")
    plain = dense(given, upstream[:1])
    clean = solve(given, upstream[:1], torch.bfloat16, "triton")
    given[place] = given[place].clone()
    given[place][0, 300, 1, 5] = torch.nan
    dirty = solve(given, upstream[:1], torch.bfloat16, backend)
    before = [[x[:, :300] for x in found[:3]] for found in (dirty, true, plain, clean)]  # out, lse, dq
    check(*before[:3])  # by which of the kernels "auto" finds what it holds is open
    assert backend == "auto" or all(torch.equal(x, y) for x, y in zip(before[0], before[3], strict=True))
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
    check(results[0], true, dense(given, upstream))


def test_more_than_two_to_the_31_elements() -> None:
    tokens = 2**31 // (32 * 128) + 1024
    if torch.cuda.mem_get_info()[0] < 6 * tokens * 32 * 128 * 2:
        pytest.skip("needs 26 GB of free memory")
    q, k, v = (torch.randn(1, tokens, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    options: dict[str, Any] = {"causal": True, "left": 64, "right": None, "scale": 0.1, "softcap": None}
    out, _ = operators.forward(q, k, v, None, None, **options, backend="triton", wide=False)
    tail = [x[:, -256:].contiguous() for x in (q, k, v)]
    plain = dense(tail, [torch.zeros_like(tail[0])], window=(64, 0), scale=0.1)[0]
    true, _ = softmax_attention(*(x.double() for x in tail), window=(64, 0), scale=0.1, backend="torch")
    check(*([x[:, -128:]] for x in (out, true, plain)))
