"""Softmax attention against the float64 reference, which is itself checked against a dense softmax."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.kernels import explain, softmax_attention
from longtrain.kernels.softmax_attention import apply_sinks, chunked, torch_impl
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.dense import Window, dense_attention, dense_mask, offsets, sees

AXES = {
    "limits": [
        (True, None),
        (True, (7, None)),
        (True, (3, 9)),
        (False, None),
        (False, (3, 5)),
        (False, (None, 0)),
    ],
    # lengths of the documents: queries', keys'
    "documents": [
        ([67], [67]),
        ([23], [67]),
        ([67], [23]),
        ([40], [150]),
        ([0, 9, 0, 31, 27, 0], [0, 9, 0, 31, 27, 0]),
        ([12, 0, 30, 35, 5], [50, 7, 11, 35, 0]),
    ],
    "shape": [(1, 3, 3, 8, 8), (1, 4, 2, 5, 9), (3, 4, 2, 9, 5), (2, 3, 1, 4, 4), (2, 2, 2, 8, 3)],  # B, H, G, K, V
    "scores": [{}, {"scale": 0.9}, {"softcap": 1.5}],
    "loss": ["out", "lse", "both", "sinks"],
    "tiles": ["native", "products", "chunked"],
}


def possible(case: dict[str, Any]) -> bool:
    packed = len(case["documents"][0]) > 1
    return not (packed and case["shape"][0] > 1) and not (case["tiles"] == "native" and "softcap" in case["scores"])


@dataclass
class Problem:
    """Float32 inputs and output gradients, so that every dtype computes on the same numbers."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of out and lse, where the loss has them
    options: dict[str, Any]

    def solve(self, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        """out, lse and the gradients of all inputs, by name."""
        inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in self.inputs.items()}
        out, lse = softmax_attention(**inputs, **self.options, backend=backend)
        assert lse is not None
        results = {"out": out, "lse": lse}
        used = [results[name] for name in self.gradients]
        upstream = [x.to(results[name].dtype) for name, x in self.gradients.items()]
        found = torch.autograd.grad(used, list(inputs.values()), upstream)
        return results | {f"d{name}": x for name, x in zip(inputs, found, strict=True)}


def problem(
    limits: tuple[bool, Window] = (True, None),
    documents: tuple[list[int], list[int]] = ([67], [67]),
    shape: tuple[int, int, int, int, int] = (1, 4, 2, 8, 8),
    scores: dict[str, float] | None = None,
    loss: str = "sinks",
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, groups, width, value_width = shape
    queries, keys = (sum(lengths) for lengths in documents)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    inputs = {
        "q": random(batch, queries, heads, width),
        "k": random(batch, keys, groups, width),
        "v": random(batch, keys, groups, value_width),
    }
    gradients = {"out": random(batch, queries, heads, value_width), "lse": random(batch, queries, heads)}
    if loss == "sinks":
        inputs["sinks"] = random(heads)
    options = {"causal": limits[0], "window": limits[1], **(scores or {})}
    if len(documents[0]) > 1:
        options["cu_seqlens"] = torch.from_numpy(offsets(documents[0])).int()
        options["cu_seqlens_k"] = torch.from_numpy(offsets(documents[1])) if documents[0] != documents[1] else None
    return Problem(inputs, {name: x for name, x in gradients.items() if loss in (name, "both", "sinks")}, options)


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to the largest number in it; -inf must stand in the same places."""
    found = {}
    for name, x in true.items():
        x, y = x.detach(), got[name].detach().double()
        assert y.shape == x.shape and (y.isfinite() == x.isfinite()).all(), name
        if name != "lse":
            assert y.isfinite().all(), name
        x, y = x.nan_to_num(neginf=0), y.nan_to_num(neginf=0)
        found[name] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0
    return found


def use_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of matrix products, as on other devices, also where the native kernel could run."""
    monkeypatch.setattr(torch_impl, "_is_native", lambda q, softcap: False)


@cover(
    {name: choices for name, choices in AXES.items() if name != "tiles"}, lambda case: possible({"tiles": ""} | case)
)
def test_reference_is_the_dense_softmax(case):
    this = problem(**case)
    got = this.solve(torch.float64, "reference")
    inputs = {name: x.double().requires_grad_() for name, x in this.inputs.items()}
    (causal, window), documents = case["limits"], [offsets(lengths) for lengths in case["documents"]]
    mask = dense_mask(causal=causal, window=window, query_offsets=documents[0], key_offsets=documents[1])
    options = {"scale": inputs["q"].shape[3] ** -0.5, "softcap": None, "sinks": None} | case["scores"]
    out, lse = dense_attention(**options | inputs, mask=mask)
    used = {"out": out, "lse": torch.where(lse.isfinite(), lse, 0)}
    upstream = {name: x.double() for name, x in this.gradients.items()}
    used = [used[name] for name in upstream]
    found = torch.autograd.grad(used, list(inputs.values()), list(upstream.values()), materialize_grads=True)
    true = {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(inputs, found, strict=True)}
    assert max(errors(got, true).values()) <= 1e-12


def backend_of(tiles: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that computes by these tiles; chunks are made small, so that queries and keys have several."""
    if tiles == "products":
        use_products(monkeypatch)
    if tiles == "chunked":
        monkeypatch.setattr(chunked, "_ROWS", 16)
        monkeypatch.setattr(chunked, "_KEYS", 24)
        return "chunked"
    return "torch"


@cover(AXES, possible)
def test_torch_and_chunked_are_the_reference(case, monkeypatch):
    backend = backend_of(case.pop("tiles"), monkeypatch)
    this = problem(**case)
    true = this.solve(torch.float64, "reference")
    assert max(errors(this.solve(torch.float64, backend), true).values()) <= 1e-10
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, backend), true).items():
        assert error <= max(4 * allowed[name], 5e-6), name


@pytest.mark.parametrize("backend", ["torch", "chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, backend):
    this = problem(scores={"scale": 0.9})
    this.inputs = {name: x.to(dtype) for name, x in this.inputs.items()}
    true, got = this.solve(torch.float64, "reference"), this.solve(dtype, backend)
    assert {name for name, x in got.items() if x.dtype != dtype} == {"lse"} and got["lse"].dtype == torch.float32
    found = errors(got, true)
    assert found.pop("lse") <= 5e-6
    # Nothing is lost but the last rounding of each result; dout is rounded too, which is part of the gradients' error.
    assert max(found.values()) <= 2 * torch.finfo(dtype).eps


def test_inputs_of_several_dtypes():
    this = problem(loss="both")
    true = this.solve(torch.float64, "reference")
    q, k, v = (this.inputs[name] for name in "qkv")
    out, lse = softmax_attention(q, k.double(), v, causal=True)
    assert out.dtype == torch.float32 and lse is not None and lse.dtype == torch.float64
    assert max(errors({"lse": lse}, {"lse": true["lse"]}).values()) <= 1e-14


@pytest.mark.parametrize("tiles", ["native", "products", "chunked"])
@pytest.mark.parametrize("window", [None, (600, None)])
def test_large_tiles(tiles, window, monkeypatch):
    """Longer than any block of rows or keys in the implementation, with keys ahead of the first query."""
    if tiles == "products":
        use_products(monkeypatch)
    backend = "chunked" if tiles == "chunked" else "torch"
    this = problem((True, window), ([700], [1300]), (1, 2, 1, 4, 4))
    inputs = {name: x.double() for name, x in this.inputs.items()}
    ends = {"query_offsets": offsets([700]), "key_offsets": offsets([1300])}
    mask = np.tril(np.ones((700, 1300), bool), 600)
    mask &= ~np.tril(mask, -1) if window else True  # left limit 600 behind the own key i + 600
    assert all(mask[i, j] == sees(i, j, causal=True, window=window, **ends) for i in (0, 99, 699) for j in range(1300))
    got = this.solve(torch.float64, backend)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    out, lse = dense_attention(**leaves, mask=mask, scale=0.5, softcap=None)
    upstream = [x.double() for x in this.gradients.values()]
    found = torch.autograd.grad([out, lse], list(leaves.values()), upstream)
    true = {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
    assert max(errors(got, true).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_strides_do_not_matter(groups, backend):
    torch.manual_seed(0)
    # Tokens or heads last in memory, and vectors that all tokens share.
    q = torch.randn(1, 4, 6, 33, dtype=torch.float64).permute(0, 3, 1, 2)
    k = torch.randn(1, 33, 6, groups, dtype=torch.float64).transpose(2, 3)
    v = torch.randn(1, 1, groups, 6, dtype=torch.float64).expand(1, 33, groups, 6)
    dout = torch.randn(1, 1, 4, 1, dtype=torch.float64).expand(1, 33, 4, 6)
    dlse = torch.randn(4, 33, dtype=torch.float64).t()[None]

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
        out, lse = softmax_attention(*leaves, backend=backend)
        assert lse is not None
        return out, lse, *torch.autograd.grad([out, lse], leaves, tensors[3:])

    inputs = (q, k, v, dout, dlse)
    for strided, dense in zip(solve(*inputs), solve(*(x.contiguous() for x in inputs)), strict=True):
        torch.testing.assert_close(strided, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_some_inputs_need_gradients(wanted):
    this = problem(loss="out")
    true = this.solve(torch.float64, "torch")
    inputs: dict[str, Any] = {name: x.double().requires_grad_(name in wanted) for name, x in this.inputs.items()}
    out, _ = softmax_attention(**inputs)
    out.backward(this.gradients["out"].double())
    for name, x in inputs.items():
        assert torch.equal(x.grad, true[f"d{name}"]) if name in wanted else x.grad is None


@pytest.mark.parametrize("backend", ["torch", "chunked", "reference"])
@pytest.mark.parametrize("size", [(1, 0, 5), (1, 5, 0), (2, 0, 0), (0, 5, 5)])  # B, T, S
def test_empty_tensors(size, backend):
    batch, queries, keys = size
    leaves = [torch.randn(batch, n, 2, 3, requires_grad=True) for n in (queries, keys, keys)]
    leaves.append(torch.randn(2, requires_grad=True))
    out, lse = softmax_attention(*leaves[:3], sinks=leaves[3], backend=backend)
    assert lse is not None and out.shape == (batch, queries, 2, 3) and lse.shape == (batch, queries, 2)
    found = torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.randn_like(lse)])
    if keys == 0:
        assert (out == 0).all() and (lse == -torch.inf).all()
        assert all((x == 0).all() for x in found)
    offset = torch.zeros(1, dtype=torch.int64) if queries == keys == 0 and batch == 1 else None
    softmax_attention(*leaves[:3], cu_seqlens=offset, backend=backend)  # no documents at all


def test_lse_may_be_left_out_and_results_repeat():
    this = problem()
    inputs: dict[str, Any] = dict(this.inputs)
    out, lse = softmax_attention(**inputs, return_lse=False)
    assert lse is None and torch.equal(out, softmax_attention(**inputs)[0])
    for backend in ("torch", "chunked"):
        first, second = this.solve(torch.float32, backend), this.solve(torch.float32, backend)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_small_sinks_keep_their_digits():
    """Sinks that take 1e-7 of a softmax: 1 - sigmoid has no digit left of their gradient in float32."""
    torch.manual_seed(0)
    out, lse, sinks = torch.randn(1, 50, 3, 4), torch.rand(1, 50, 3) + 8, torch.tensor([-8.0, -9.0, -torch.inf])
    gradient = torch.randn(1, 50, 3, 4)
    found = {}
    for dtype in (torch.float64, torch.float32):
        leaf = sinks.to(dtype).requires_grad_()
        joined = apply_sinks(out.to(dtype), lse.to(dtype), leaf)
        (found[dtype],) = torch.autograd.grad(joined, leaf, gradient.to(dtype))
        assert joined.dtype == dtype
    assert found[torch.float32][2] == 0
    torch.testing.assert_close(found[torch.float32].double(), found[torch.float64], rtol=1e-5, atol=0)


def test_memory_is_linear_in_the_length():
    """A dense mask of this length alone would be 17 GB."""
    length = 1 << 16
    q, k, v = (torch.randn(1, length, 1, 4).requires_grad_() for _ in range(3))
    cases: list[dict[str, Any]] = [
        {"window": (5, 3)},
        {"cu_seqlens": torch.arange(0, length + 1, 1 << 11), "window": (500, 9)},
    ]
    for options in cases:
        out, _ = softmax_attention(q, k, v, causal=False, **options)
        torch.autograd.grad(out, [q, k, v], torch.randn_like(out))


class LargestTensor(TorchDispatchMode):
    """The size of the largest result of any operator."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_is_larger_than_a_tile(softcap, causal):
    q, k, v = (torch.randn(1, 1100, 2, 4).requires_grad_() for _ in range(3))
    with LargestTensor() as largest:
        out, _ = softmax_attention(q, k, v, causal=causal, softcap=softcap)
        torch.autograd.grad(out, [q, k, v], torch.randn_like(out))
    assert q.numel() <= largest.numel <= max(q.numel(), 2 * 256 * 512)


def valid() -> dict[str, Any]:
    return {"q": torch.randn(1, 6, 4, 8), "k": torch.randn(1, 6, 2, 8), "v": torch.randn(1, 6, 2, 5)}


REFUSED = [
    ({"q": torch.randn(6, 4, 8)}, "q: got shape (6, 4, 8), expected [B, T, H, K]"),
    ({"q": None}, "q: got NoneType, expected a tensor [B, T, H, K]"),
    ({"q": torch.ones(1, 6, 4, 8, dtype=torch.int64)}, "q: got dtype torch.int64, expected float64, float32"),
    ({"v": torch.ones(1, 6, 2, 5, dtype=torch.bool)}, "v: got dtype torch.bool, expected float64"),
    ({"k": torch.randn(1, 6, 2, 8, device="meta")}, "k: got device meta, expected that of q, cpu"),
    ({"sinks": torch.randn(4, device="meta")}, "sinks: got device meta, expected that of q, cpu"),
    ({"k": torch.randn(1, 6, 2, 7)}, "k: got shape (1, 6, 2, 7), expected [B, S, G, K] with q's B = 1, K = 8"),
    ({"k": torch.randn(2, 6, 2, 8)}, "k: got shape (2, 6, 2, 8), expected [B, S, G, K]"),
    ({"k": torch.randn(1, 6, 3, 8)}, "k: got 3 heads, expected a divisor of q's 4 heads"),
    ({"k": torch.randn(1, 6, 0, 8)}, "k: got 0 heads, expected a divisor of q's 4 heads"),
    ({"q": torch.randn(1, 6, 4, 0)}, "q: got shape (1, 6, 4, 0), expected [B, T, H, K] with H and K at least 1"),
    ({"v": torch.randn(1, 6, 4, 5)}, "v: got shape (1, 6, 4, 5), expected [B, S, G, V] = [1, 6, 2, any >= 1]"),
    ({"v": torch.randn(1, 5, 2, 5)}, "v: got shape (1, 5, 2, 5), expected [B, S, G, V] = [1, 6, 2, any >= 1]"),
    ({"v": torch.randn(1, 6, 2, 0)}, "v: got shape (1, 6, 2, 0)"),
    ({"sinks": torch.randn(2)}, "sinks: got shape (2,), expected [H] = [4]"),
    ({"sinks": torch.ones(4, dtype=torch.int32)}, "sinks: got dtype torch.int32"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got 0 ... 5, expected boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens: got 1 ... 6, expected boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens: got descending boundaries"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens: got dtype torch.float32, expected int32 or int64"),
    ({"cu_seqlens": torch.tensor([[0, 6]])}, "cu_seqlens: got shape (1, 2), expected [N+1]"),
    ({"cu_seqlens": [0, 6]}, "cu_seqlens: got list, expected an int32 or int64 tensor [N+1]"),
    ({"cu_seqlens_k": torch.tensor([0, 3, 6])}, "cu_seqlens_k: got 2 documents, expected as many as queries have, 1"),
    (
        {"cu_seqlens": torch.tensor([0, 3, 6]), "cu_seqlens_k": torch.tensor([0, 7])},
        "cu_seqlens_k: got 0 ... 7, expected boundaries from 0 to 6",
    ),
    (
        {"q": torch.randn(1, 5, 4, 8), "cu_seqlens": torch.tensor([0, 5])},
        "cu_seqlens_k: got None with 5 queries and 6 keys, expected boundaries of the keys",
    ),
    (
        {name: x.expand(2, -1, -1, -1) for name, x in valid().items()} | {"cu_seqlens": torch.tensor([0, 6])},
        "cu_seqlens: got it with 2 batch rows, expected one row",
    ),
    ({"cu_seqlens": torch.tensor([0, 6], device="meta")}, "cu_seqlens: got device meta, expected boundaries that can"),
    ({"k": torch.randn(1, 6, 2, 8).to_sparse()}, "k: got layout torch.sparse_coo, expected a dense tensor"),
    ({"causal": 1}, "causal: got 1, expected True or False"),
    ({"return_lse": "no"}, "return_lse: got 'no', expected True or False"),
    ({"window": 3}, "window: got 3, expected None or a pair (left, right)"),
    ({"window": (3,)}, "window: got (3,), expected None or a pair (left, right)"),
    ({"window": (-1, 0)}, "window: got (-1, 0), expected counts >= 0"),
    ({"window": (2.5, 0)}, "window: got (2.5, 0), expected counts >= 0"),
    ({"scale": float("nan")}, "scale: got nan, expected a finite number"),
    ({"scale": torch.tensor(1.0)}, "scale: got tensor(1.), expected a finite number"),
    ({"softcap": 0.0}, "softcap: got 0.0, expected a number above 0"),
    ({"softcap": "30"}, "softcap: got '30', expected a finite number"),
    (
        {"backend": "triton"},
        "backend: got 'triton' (Triton needs a GPU (on a CPU only its interpreter, TRITON_INTERPRET=1, runs)), "
        "expected for softmax_attention on cpu: 'auto', 'torch', 'chunked', 'reference'",
    ),
    ({"backend": "chunks"}, "backend: got 'chunks'"),
    ({"backend": None}, "backend: got None"),
]


@pytest.mark.parametrize(("wrong", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refusals(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        softmax_attention(**valid() | wrong)


def test_explain_says_what_runs():
    assert "runs 'torch'" in explain("softmax_attention")
    for device in ("cuda", "mps", "xpu"):
        said = explain("softmax_attention", device=device)
        assert f"on {device} runs 'chunked': chunks of queries and keys" in said and "'triton' cannot run here" in said
        assert "'torch' also there: " in said and "(its native tile runs on a CPU only" in said
    assert "runs 'reference'" in explain("softmax_attention", backend="reference")
    with pytest.raises(ValueError, match="operator: got 'softmax', expected one of 'softmax_attention'"):
        explain("softmax")
    with pytest.raises(ValueError, match="backend: got 'triton' .*, expected for linear_attention"):
        explain("linear_attention", backend="triton")
