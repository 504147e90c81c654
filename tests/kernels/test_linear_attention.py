"""Linear attention by chunks against the float64 reference, which is itself checked against a dense sum."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.kernels import explain, linear_attention
from longtrain.kernels.linear_attention import chunking, decays, within_chunk
from tests.cover import cover, pytest_generate_tests  # noqa: F401

# Log-decays: per token 1e-3 carries states over hundreds of tokens, so that every transition matters; -50 and -inf
# overflow whatever divides by a decay; "mixed" has all of them side by side, and 0.
STRENGTHS = ["slow", "fast", "very fast", "mixed", "none at all", "forgets"]

AXES = {
    "decay": ["none", "head", "token", "channel"],
    "strength": STRENGTHS[:4],
    "heads": [(3, 3), (4, 2), (3, 1)],  # H, G
    "widths": [(5, 9), (7, 1)],  # K, V
    "documents": [[150], [64, 64], [0, 1, 90, 0, 33, 64, 17, 0], [3] * 20],  # without a 0 and alike: rows of a batch
    "states": ["neither", "both"],  # initial and final ones
    "form": ["matrix", "halving", "other device"],  # of what is computed within chunks
    "tile": [1, 3, 100],  # chunks
}


@pytest.fixture(autouse=True)
def fill_empty_with_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all() and torch.ones(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def possible(case: dict[str, Any]) -> bool:
    return not (case["decay"] == "none" and case["strength"] != "slow")


def log_decays(shape: tuple[int, ...], strength: str, generator: torch.Generator) -> Tensor:
    g = -torch.rand(shape, generator=generator)
    kinds = {
        "slow": 1e-3 * g,
        "fast": 5 * g,
        "very fast": 50 * g,
        "none at all": 0 * g,
        "forgets": torch.full(shape, -torch.inf),
    }
    if strength != "mixed":
        return kinds[strength]
    which = torch.rand(shape, generator=generator)
    g = torch.where(which < 0.8, kinds["slow"], torch.where(which < 0.9, kinds["fast"], kinds["none at all"]))
    return torch.where(which < 0.1, kinds["very fast"], torch.where(which < 0.05, kinds["forgets"], g))


@dataclass
class Problem:
    """Float32 inputs and output gradients, so that every dtype computes on the same numbers."""

    inputs: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of out and state, where the loss has them
    options: dict[str, Any]

    def solve(self, dtype: torch.dtype, backend: str = "torch") -> dict[str, Tensor]:
        """out, the state and the gradients of all inputs, by name."""
        inputs: dict[str, Any] = {name: x.to(dtype, copy=True).requires_grad_() for name, x in self.inputs.items()}
        out, state = linear_attention(**inputs, **self.options, return_state=True, backend=backend)
        assert state is not None
        results = {"out": out, "state": state}
        used = [results[name] for name in self.gradients]
        upstream = [x.to(results[name].dtype) for name, x in self.gradients.items()]
        found = torch.autograd.grad(used, list(inputs.values()), upstream, materialize_grads=True)
        return results | {f"d{name}": x for name, x in zip(inputs, found, strict=True)}


def problem(
    decay: str = "token",
    strength: str = "slow",
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (5, 9),
    documents: tuple[int, ...] | list[int] = (40, 0, 97),
    states: str = "both",
    batch: int | None = None,
    seed: int = 0,
) -> Problem:
    """documents: lengths of those packed into one row; or with `batch` the one length of each row."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    (all_heads, groups), (key_width, value_width) = heads, widths
    rows, tokens, count = (1, sum(documents), len(documents)) if batch is None else (batch, documents[0], batch)
    inputs = {
        "q": random(rows, tokens, groups, key_width),
        "k": random(rows, tokens, groups, key_width),
        "v": random(rows, tokens, all_heads, value_width),
    }
    shapes = {"head": (all_heads,), "token": (rows, tokens, all_heads), "channel": (rows, tokens, all_heads, key_width)}
    if decay != "none":
        inputs["log_decay"] = log_decays(shapes[decay], strength, generator)
    options: dict[str, Any] = {"scale": 0.7}
    if states == "both":
        inputs["initial_state"] = random(count, all_heads, key_width, value_width)
    if batch is None:
        options["cu_seqlens"] = torch.tensor([0, *documents]).cumsum(0)
    gradients = {"out": random(*inputs["v"].shape), "state": random(count, all_heads, key_width, value_width)}
    if states == "neither":
        gradients.pop("state")
    return Problem(inputs, gradients, options)


def problem_of(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Problem:
    """The problem of a case of AXES; sets the form and the size of tiles."""
    case = dict(case)
    form = case.pop("form")
    if form == "halving":
        monkeypatch.setattr(within_chunk, "_finite", lambda *results: False)
    if form == "other device":
        monkeypatch.setattr(decays, "_MATRIX_DEVICES", ())
    heads, widths = case["heads"][0], case["widths"]
    monkeypatch.setattr(chunking, "_CPU_TILE", case.pop("tile") * heads * 64 * (sum(widths) + 64) // 3 + 1)
    documents = case["documents"]
    batch = len(documents) if len(set(documents)) == 1 else None
    return problem(**case, batch=batch)


def errors(got: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor, relative to the largest number in it."""
    found = {}
    for name, x in true.items():
        x, y = x.detach(), got[name].detach().double()
        assert y.shape == x.shape and y.isfinite().all(), name
        found[name] = float((y - x).abs().max() / x.abs().max().clamp_min(1e-30)) if x.numel() else 0.0
    return found


def dense(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """One document [T, ...] as a sum over all pairs of tokens, the decay between them summed up term by term."""
    tokens, heads = v.shape[:2]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    g = v.new_zeros(heads) if log_decay is None else log_decay
    g = (g.expand(tokens, heads)[..., None] if g.ndim < 3 else g).expand(k.shape)
    initial = v.new_zeros(heads, k.shape[2], v.shape[2]) if initial is None else initial
    # after[i, j]: what is left of token j's k v^T (j = 0: of the initial state) when token i reads it, [T, T + 1, H, K]
    steps = torch.arange(tokens)
    between = (steps[:, None, None] >= steps) & (steps >= torch.arange(tokens + 1)[:, None])  # [T, T + 1, T]: i, j, t
    after = torch.where(between[..., None, None], g, 0).sum(2).exp()
    seen = (torch.arange(tokens + 1) <= steps[:, None] + 1)[..., None, None]
    after = torch.where(seen, after, 0)
    out = torch.einsum("ihk,ijhk,jhk,jhv->ihv", q, after[:, 1:], k, v)
    out = out + torch.einsum("ihk,ihk,hkv->ihv", q, after[:, 0], initial)
    state = torch.einsum("jhk,jhk,jhv->hkv", after[-1, 1:], k, v) + after[-1, 0, :, :, None] * initial
    return out, state


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_reference_is_the_dense_sum(decay, strength):
    lengths = [9, 20]
    this = problem(decay, strength, documents=lengths)
    got = this.solve(torch.float64, "reference")
    inputs = {name: x.double().requires_grad_() for name, x in this.inputs.items()}
    parts = []
    for n, start, stop in ((0, 0, 9), (1, 9, 29)):
        g = inputs.get("log_decay")
        g = g if g is None or g.ndim == 1 else g[0, start:stop]
        q, k, v = (inputs[name][0, start:stop] for name in "qkv")
        parts.append(dense(q, k, v, g, inputs["initial_state"][n]))
    out = 0.7 * torch.cat([out for out, _ in parts])[None]
    state = torch.stack([state for _, state in parts])
    upstream = [this.gradients[name].double() for name in ("out", "state")]
    found = torch.autograd.grad([out, state], list(inputs.values()), upstream)
    true = {"out": out, "state": state} | {f"d{name}": x for name, x in zip(inputs, found, strict=True)}
    assert max(errors(got, true).values()) <= 1e-12


@cover(AXES, possible)
def test_torch_is_the_reference(case, monkeypatch):
    this = problem_of(case, monkeypatch)
    true = this.solve(torch.float64, "reference")
    assert max(errors(this.solve(torch.float64), true).values()) <= 1e-10
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32), true).items():
        assert error <= max(4 * allowed[name], 5e-6), name


@pytest.mark.parametrize("strength", ["slow", "fast"])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_decay_gradients_do_not_cancel(decay, strength):
    """Over 1,500 tokens the textbook's difference of running sums loses 1e-5 and more of them in float32."""
    this = problem(decay, strength, heads=(2, 2), widths=(16, 16), documents=[1500], states="neither")
    true, got = this.solve(torch.float64)["dlog_decay"], this.solve(torch.float32)["dlog_decay"].double()
    assert (got - true).norm() <= 1e-6 * true.norm()


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_queries_and_keys_may_be_shared_differently(decay):
    this = problem(decay)
    this.inputs["q"] = torch.randn(1, 137, 4, 5, generator=torch.Generator().manual_seed(1))
    assert this.inputs["k"].shape[2] == 2
    assert max(errors(this.solve(torch.float64), this.solve(torch.float64, "reference")).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, backend):
    this = problem(strength="fast")
    this.inputs = {name: x.to(dtype) for name, x in this.inputs.items()}
    true, got = this.solve(torch.float64, "reference"), this.solve(dtype, backend)
    assert {name for name, x in got.items() if x.dtype != dtype} == {"state"} and got["state"].dtype == torch.float32
    found = errors(got, true)
    assert found.pop("state") <= 5e-6
    # Nothing is lost but the last rounding of each result, and that of the output gradient.
    assert max(found.values()) <= 2 * torch.finfo(dtype).eps


def test_inputs_of_several_dtypes():
    this = problem()
    true = this.solve(torch.float64, "reference")
    inputs: dict[str, Any] = dict(this.inputs)
    inputs["k"] = inputs["k"].double()
    out, state = linear_attention(**inputs, **this.options, return_state=True)
    assert out.dtype == torch.float32 and state is not None and state.dtype == torch.float64
    assert max(errors({"state": state}, {"state": true["state"]}).values()) <= 1e-14


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend):
    this = problem()
    plain = this.solve(torch.float32, backend)
    with torch.autocast("cpu", torch.bfloat16):
        inputs: dict[str, Any] = this.inputs
        out, state = linear_attention(**inputs, **this.options, return_state=True, backend=backend)
    assert state is not None and torch.equal(out, plain["out"]) and torch.equal(state, plain["state"])


def test_strides_do_not_matter():
    torch.manual_seed(0)
    # Heads or tokens last in memory, a slice of something wider, and numbers that all tokens share.
    q = torch.randn(2, 4, 6, 83, dtype=torch.float64).permute(0, 3, 1, 2)
    k = torch.randn(2, 83, 4, 3, 6, dtype=torch.float64)[:, :, :, 1]
    v = torch.randn(2, 1, 4, 7, dtype=torch.float64).expand(2, 83, 4, 7)
    g = -torch.rand(83, 4, 2, dtype=torch.float64).permute(2, 0, 1)
    initial = torch.randn(4, 2, 7, 6, dtype=torch.float64).permute(1, 0, 3, 2)
    dout = torch.randn(2, 1, 4, 1, dtype=torch.float64).expand(2, 83, 4, 7)
    dstate = torch.randn(7, 6, 4, 2, dtype=torch.float64).permute(3, 2, 1, 0)

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:5]]
        out, state = linear_attention(*leaves[:4], initial_state=leaves[4], return_state=True)
        assert state is not None
        return out, state, *torch.autograd.grad([out, state], leaves, tensors[5:])

    inputs = (q, k, v, g, initial, dout, dstate)
    for strided, plain in zip(solve(*inputs), solve(*(x.contiguous() for x in inputs)), strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [["q"], ["k"], ["v"], ["log_decay"], ["initial_state"], ["k", "log_decay"]])
@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_only_some_inputs_need_gradients(decay, wanted):
    this = problem(decay)
    true = this.solve(torch.float64)
    inputs: dict[str, Any] = {name: x.double().requires_grad_(name in wanted) for name, x in this.inputs.items()}
    out, state = linear_attention(**inputs, **this.options, return_state=True)
    assert state is not None
    torch.autograd.backward([out, state], [this.gradients["out"].double(), this.gradients["state"].double()])
    for name, x in inputs.items():
        assert torch.equal(x.grad, true[f"d{name}"]) if name in wanted else x.grad is None


@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_a_loss_may_use_the_state_alone(decay):
    this = problem(decay)
    del this.gradients["out"]
    true = this.solve(torch.float64, "reference")
    assert (true["dq"] == 0).all() and max(errors(this.solve(torch.float64), true).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_an_empty_document_passes_its_state_through(decay, backend):
    this = problem(decay, documents=[0, 30, 0, 0])
    got = this.solve(torch.float64, backend)
    for n in (0, 2, 3):
        assert torch.equal(got["state"][n], this.inputs["initial_state"][n].double())
        assert torch.equal(got["dinitial_state"][n], this.gradients["state"][n].double())
    del this.inputs["initial_state"]
    assert (this.solve(torch.float64, backend)["state"][[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("decay", ["none", "head", "token", "channel"])
def test_nothing_to_do(decay, backend):
    for batch, documents in ((None, []), (None, [0]), (1, [0]), (3, [0]), (0, [5])):
        this = problem(decay, documents=documents, batch=batch)
        got = this.solve(torch.float32, backend)
        assert got["out"].shape == this.inputs["v"].shape and got["state"].shape == this.gradients["state"].shape
        assert torch.equal(got["dinitial_state"], this.gradients["state"])
        assert decay == "none" or (got["dlog_decay"] == 0).all()


def test_the_state_may_be_left_out_and_results_repeat():
    this = problem()
    inputs: dict[str, Any] = this.inputs
    out, state = linear_attention(**inputs, **this.options)
    assert state is None and torch.equal(out, linear_attention(**inputs, **this.options, return_state=True)[0])
    first, second = this.solve(torch.float32), this.solve(torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_defaults():
    q, k, v = (torch.randn(2, 70, 3, 16, dtype=torch.float64) for _ in range(3))
    out, state = linear_attention(q, k, v)
    assert state is None
    for head in range(3):
        scores = (q[:, :, head] @ k[:, :, head].transpose(1, 2)).tril() / 4
        torch.testing.assert_close(out[:, :, head], scores @ v[:, :, head], rtol=1e-12, atol=1e-12)
    assert "runs 'torch'" in explain("linear_attention")
