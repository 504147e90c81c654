"""Linear attention: stages, NaN and inf, memory and time per token, chunk sizes, and what it refuses."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain import debug
from longtrain.kernels import checks, linear_attention
from longtrain.kernels.linear_attention import (
    LinearAttentionBackward,
    LinearAttentionForward,
    chunking,
    operators,
    within_chunk,
)
from longtrain.kernels.linear_attention.decays import Decay
from tests.kernels.test_linear_attention import Problem, fill_empty_with_nan, problem  # noqa: F401 (a fixture)

DECAYS = ["none", "head", "token", "channel"]


def double(this: Problem) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor, Tensor, Tensor]:
    """(q, k, v, log_decay), the initial state [B, 1, H, K, V], and the gradients of out and of the final state."""
    inputs = {name: x.double() for name, x in this.inputs.items()}
    tensors = (inputs["q"], inputs["k"], inputs["v"], inputs.get("log_decay"))
    state, dstate = inputs["initial_state"][:, None], this.gradients["state"].double()[:, None]
    return tensors, state, this.gradients["out"].double(), dstate


def carried(log_transition: Tensor, state: Tensor) -> Tensor:
    return log_transition.exp()[..., None] * state


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("cut", [0, 1, 64, 99, 150])
@pytest.mark.parametrize("decay", DECAYS)
def test_two_pieces_joined_by_their_summaries_are_one(decay, cut, groups, staged, monkeypatch):
    """As two ranks, or two runs of one rank, would do it: only summaries pass between the pieces."""
    monkeypatch.setattr(chunking, "_CPU_TILE", 30_000)  # several tiles
    this = problem(decay, heads=(4, groups), documents=[150], batch=2)
    (q, k, v, g), initial, dout, dfinal = double(this)
    whole, one, two = (np.array(x) for x in ([0, 150], [0, cut, 150], [0, 150]))
    out, final = LinearAttentionForward(q, k, v, g, whole, scale=0.7).finish(initial)
    assert final is not None
    need = {"need_decay_gradient": decay != "none"}
    backward = LinearAttentionBackward(q, k, v, g, whole, dout, scale=0.7)
    true = backward.finish(initial, dfinal, **need)

    forward = LinearAttentionForward(q, k, v, g, one, scale=0.7)
    logs, states = forward.summaries()
    middle = carried(logs[:, 0], initial[:, 0]) + states[:, 0]
    torch.testing.assert_close(carried(logs[:, 1], middle) + states[:, 1], final[:, 0], rtol=1e-12, atol=1e-12)
    if staged:
        forward.local()
    else:
        forward = LinearAttentionForward(q, k, v, g, one, scale=0.7)
    entering = torch.stack((initial[:, 0], middle), 1)
    found, leaving = forward.finish(entering)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(leaving, torch.stack((middle, final[:, 0]), 1), rtol=1e-12, atol=1e-12)

    backward = LinearAttentionBackward(q, k, v, g, one, dout, scale=0.7)
    dstates = backward.summaries()
    assert torch.equal(backward.log_transition(), logs)
    dmiddle = carried(logs[:, 1], dfinal[:, 0]) + dstates[:, 1]
    if staged:
        backward.local(entering, **need)
    else:
        backward = LinearAttentionBackward(q, k, v, g, one, dout, scale=0.7)
    *gradients, dentering = backward.finish(entering, torch.stack((dmiddle, dfinal[:, 0]), 1), **need)
    assert dentering is not None
    torch.testing.assert_close(dentering[:, 1], dmiddle, rtol=1e-12, atol=1e-12)
    for gradient, x in zip((*gradients, dentering[:, :1]), true, strict=True):
        torch.testing.assert_close(gradient, x, rtol=1e-12, atol=1e-12)
    # Without a state on either side: what comes of the pieces alone.
    forward = LinearAttentionForward(q, k, v, g, two, scale=0.7)
    logs, states = forward.summaries()
    assert forward.finish(None, return_state=False)[1] is None
    torch.testing.assert_close(carried(logs, initial) + states, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_infinite_decays_sum_up(decay):
    this = problem(decay, "forgets", documents=[70], batch=1)
    (q, k, v, g), initial, _, _ = double(this)
    forward = LinearAttentionForward(q, k, v, g, np.array([0, 0, 30, 70]), scale=1.0)
    logs, states = forward.summaries()
    assert logs.shape == (1, 3, 4, 5 if decay == "channel" else 1) and (logs[:, 0] == 0).all()
    assert (states[:, 0] == 0).all() and states.isfinite().all()
    if decay != "none":
        assert (logs[:, 1:] == -torch.inf).all()
        torch.testing.assert_close(states[0, 2], torch.einsum("hk,hv->hkv", k[0, -1].repeat_interleave(2, 0), v[0, -1]))
        assert (carried(logs, initial)[:, 1:] == 0).all()


@pytest.mark.parametrize("decay", DECAYS)
def test_stages_without_tokens(decay):
    """As on a rank that holds none: N is 0."""
    this = problem(decay, documents=[0], batch=1)
    (q, k, v, g), _, dout, _ = double(this)
    forward = LinearAttentionForward(q, k, v, g, np.array([0]), scale=1.0)
    logs, states = forward.summaries()
    forward.local()
    out, final = forward.finish(states)
    assert final is not None and out.shape == v.shape and states.shape == final.shape == (1, 0, 4, 5, 9)
    assert logs.shape == (1, 0, 4, 5 if decay == "channel" else 1)
    backward = LinearAttentionBackward(q, k, v, g, np.array([0]), dout, scale=1.0)
    dstates = backward.summaries()
    need = decay != "none"
    backward.local(states, need_decay_gradient=need)
    assert backward.log_transition().shape == logs.shape and dstates.shape == states.shape
    *gradients, dinitial = backward.finish(states, dstates, need_decay_gradient=need)
    assert dinitial is not None and dinitial.shape == states.shape
    for gradient, x in zip(gradients, (q, k, v, g), strict=True):
        assert gradient is None if x is None else gradient is not None and gradient.shape == x.shape


@pytest.mark.parametrize("strength", ["mixed", "forgets"])
@pytest.mark.parametrize("decay", ["head", "token"])
def test_strong_decays_stay_on_the_fast_path(decay, strength, monkeypatch):
    """They make no NaN there, for which all would be computed again."""
    this = problem(decay, strength)
    monkeypatch.setattr(within_chunk, "_attend_halving", None)
    monkeypatch.setattr(within_chunk, "_attend_halving_backward", None)
    this.solve(torch.float32)


@pytest.mark.parametrize("shape", [(4,), (1, 150, 4), (1, 150, 4, 8)])
def test_factors_are_never_denormal(shape):
    """A CPU multiplies such numbers many times more slowly."""
    values = torch.zeros(1, 150, 4, 8)
    cut = chunking.chunked(np.array([0, 150]), rows=1, heads=4, key_width=8, value_width=8, on_cpu=True)
    decay = Decay(torch.full(shape, -1.4), values, cut, dtype=torch.float32).of(cut.tiles[0])
    levels = [x for level in decay.halvings.levels for x in (level.rise, level.fall)]
    assert decay.factors.through is not None
    factors = [decay.between, decay.factors.from_start, decay.factors.to_end, *decay.factors.through, *levels]
    for x in factors:
        assert x is None or ((x == 0) | (x > 1e-31)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("decay", DECAYS)
def test_nan_and_inf_stay_with_those_who_depend_on_them(decay, bad, monkeypatch):
    """Results that are not finite are exactly those of the recurrence, and the others are right."""
    monkeypatch.setattr(chunking, "_CPU_TILE", 60_000)  # several tiles
    documents = [90, 0, 60]
    places = [(where, at) for where in ("q", "k", "v", "log_decay", "out") for at in (0, 37, 63, 89, 90, 149)]
    for where, at in [*places, ("initial_state", 0), ("initial_state", 2), ("state", 0), ("state", 2)]:
        this = problem(decay, "slow", (4, 2), (3, 5), documents)
        tensors = this.gradients if where in ("out", "state") else this.inputs
        if where not in tensors or (where == "log_decay" and bad > 0):
            continue
        x = tensors[where]
        row = x[at] if where.endswith("state") else x[0, at] if x.ndim > 1 else x
        row[(1,) * row.ndim] = bad
        got, true = this.solve(torch.float32), this.solve(torch.float32, "reference")
        for name, y in true.items():
            message = f"{bad} in {where} at {at}: {name}"
            assert torch.equal(got[name].isfinite(), y.isfinite()), message
            finite = y.isfinite()
            torch.testing.assert_close(got[name][finite], y[finite], rtol=1e-4, atol=1e-4, msg=message)


@pytest.mark.parametrize("last", ["k", "v"])
@pytest.mark.parametrize("first", ["q", "dout"])
@pytest.mark.parametrize("decay", DECAYS)
def test_what_lies_between_two_bad_numbers_is_not_reached(decay, first, last, monkeypatch):
    """Gradients of the decays there need neither what is read before nor what is written after."""
    monkeypatch.setattr(chunking, "_CPU_TILE", 60_000)  # several tiles
    this = problem(decay, "slow", (2, 2), (3, 5), [20, 150])
    (this.gradients["out"] if first == "dout" else this.inputs[first])[0, 30, 1, 1] = torch.nan
    this.inputs[last][0, 110, 1, 1] = torch.nan
    got, true = this.solve(torch.float32), this.solve(torch.float32, "reference")
    for name, y in true.items():
        assert torch.equal(got[name].isfinite(), y.isfinite()), name
    if decay in ("token", "channel"):
        assert got["dlog_decay"][0, 31:111].isfinite().all()
        assert not got["dlog_decay"][0, 20:31, 1].isfinite().all()


class Work(TorchDispatchMode):
    """How many operators run, which, and the size of their largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest, self.names = 0, 0, set[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.names.add(func.name())
        self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def work(tokens: int, decay: str) -> Work:
    """Of what the registered operators do inside, where no dispatch mode looks."""
    this = problem(decay, heads=(2, 2), widths=(16, 16), documents=[tokens], states="neither", batch=1)
    q, k, v, g = (this.inputs.get(name) for name in ("q", "k", "v", "log_decay"))
    assert q is not None and k is not None and v is not None
    bounds = np.array([0, tokens])
    with Work() as counted:
        LinearAttentionForward(q, k, v, g, bounds, scale=0.25).finish(None, return_state=False)
        backward = LinearAttentionBackward(q, k, v, g, bounds, this.gradients["out"], scale=0.25)
        backward.finish(None, None, need_decay_gradient=g is not None, need_state_gradient=False)
    return counted


@pytest.mark.parametrize("decay", DECAYS)
def test_time_and_memory_are_linear_in_the_length(decay, monkeypatch):
    monkeypatch.setattr(chunking, "_CPU_TILE", 2 * 64 * 32 * 4)  # tiles of 256 tokens
    long, longer = work(4096, decay), work(8192, decay)
    assert longer.calls <= 2 * long.calls
    assert long.largest == 4096 * 2 * 16 and longer.largest == 8192 * 2 * 16  # an input


def test_chunks_fit_their_segments():
    widths = {"rows": 1, "heads": 4, "key_width": 64, "value_width": 64, "on_cpu": True}
    for length, size in ((4, 16), (16, 16), (30, 32), (64, 64), (1000, 64)):
        cut = chunking.chunked(np.arange(0, 50 * length + 1, length), **widths)
        assert cut.size == size, length
        assert sum(run.full * size + run.rest for tile in cut.tiles for run in tile.runs) == 50 * length
        for tile in cut.tiles[:-1]:
            assert tile.chunks == cut.tiles[0].chunks
            assert tile.chunks * size * 4 * (64 + 64 + size) <= 3 * 2**17
    assert not chunking.chunked(np.array([0, 0, 0]), **widths).tiles


def valid() -> dict[str, Any]:
    return {"q": torch.randn(1, 6, 2, 8), "k": torch.randn(1, 6, 2, 8), "v": torch.randn(1, 6, 4, 5)}


REFUSED = [
    ({"q": torch.randn(6, 2, 8)}, "q: got shape (6, 2, 8), expected [B, T, G, K]"),
    ({"q": None}, "q: got NoneType, expected a tensor [B, T, G, K]"),
    ({"k": torch.ones(1, 6, 2, 8, dtype=torch.int64)}, "k: got dtype torch.int64, expected float64, float32"),
    ({"v": torch.randn(1, 6, 4, 5, device="meta")}, "v: got device meta, expected that of q, cpu"),
    (
        {"q": torch.randn(1, 5, 2, 8)},
        "q: got shape (1, 5, 2, 8), expected [B, T, G, K], with v's B and T and one K for q and k, = [1, 6, any",
    ),
    ({"k": torch.randn(2, 6, 2, 8)}, "k: got shape (2, 6, 2, 8), expected [B, T, G, K], with v's B and T"),
    ({"k": torch.randn(1, 6, 2, 7)}, "k: got shape (1, 6, 2, 7), expected [B, T, G, K], with v's B and T and one K"),
    ({"q": torch.randn(1, 6, 2, 0)}, "q: got shape (1, 6, 2, 0)"),
    ({"v": torch.randn(1, 6, 4, 0)}, "v: got shape (1, 6, 4, 0), expected [B, T, H, V]"),
    ({"v": torch.randn(1, 6, 0, 5)}, "v: got shape (1, 6, 0, 5), expected [B, T, H, V]"),
    ({"q": torch.randn(1, 6, 3, 8)}, "q: got 3 heads, expected a divisor of v's 4 heads"),
    ({"k": torch.randn(1, 6, 8, 8)}, "k: got 8 heads, expected a divisor of v's 4 heads"),
    ({"k": torch.randn(1, 6, 0, 8)}, "k: got 0 heads, expected a divisor of v's 4 heads"),
    ({"log_decay": -0.1}, "log_decay: got float, expected None or a tensor [H], [B, T, H] or [B, T, H, K]"),
    ({"log_decay": -torch.ones(4, dtype=torch.int32)}, "log_decay: got dtype torch.int32"),
    (
        {"log_decay": -torch.ones(2)},
        "log_decay: got shape (2,), expected None or [H], [B, T, H] or [B, T, H, K]: [4] or [1,",
    ),
    ({"log_decay": -torch.ones(1, 6, 2)}, "log_decay: got shape (1, 6, 2)"),
    ({"log_decay": -torch.ones(1, 6, 4, 5)}, "log_decay: got shape (1, 6, 4, 5)"),
    ({"log_decay": -torch.ones(4, device="meta")}, "log_decay: got device meta, expected that of q, cpu"),
    ({"log_decay": torch.tensor([-1.0, 0, 0.5, -2])}, "log_decay: got 0.5, expected no number above 0"),
    ({"log_decay": torch.tensor([-1.0, torch.nan, 0.5, -2])}, "log_decay: got 0.5, expected no number above 0"),
    ({"log_decay": torch.full((1, 6, 4, 8), 0.25)}, "log_decay: got 0.25, expected no number above 0"),
    ({"scale": torch.tensor(1.0)}, "scale: got tensor(1.), expected a finite number"),
    ({"scale": float("nan")}, "scale: got nan, expected a finite number"),
    ({"initial_state": torch.randn(4, 8, 5)}, "initial_state: got shape (4, 8, 5), expected [B, H, K, V]"),
    ({"initial_state": torch.randn(1, 4, 5, 8)}, "initial_state: got shape (1, 4, 5, 8), expected [B, H, K, V] = [1,"),
    ({"initial_state": torch.ones(1, 4, 8, 5).int()}, "initial_state: got dtype torch.int32"),
    ({"initial_state": torch.randn(1, 4, 8, 5, device="meta")}, "initial_state: got device meta, expected that of q"),
    (
        {"initial_state": torch.randn(1, 4, 8, 5), "cu_seqlens": torch.tensor([0, 2, 6])},
        "initial_state: got shape (1, 4, 8, 5), expected [N, H, K, V] = [2, 4, 8, 5]",
    ),
    ({"log_decay": -torch.ones(1, 6, 4).to_sparse()}, "log_decay: got layout torch.sparse_coo, expected a dense"),
    ({"backend": None}, "backend: got None, expected a name"),
    ({"return_state": 1}, "return_state: got 1, expected True or False"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens: got 0 ... 5, expected boundaries from 0 to 6"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens: got descending boundaries"),
    (
        {"backend": "triton"},
        "backend: got 'triton' (Triton needs a GPU (on a CPU only its interpreter, TRITON_INTERPRET=1, runs)), "
        "expected for linear_attention on cpu: 'auto', 'torch', 'reference'",
    ),
    ({"backend": "chunked"}, "backend: got 'chunked'"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_attention(**valid() | arguments)


def test_packed_documents_are_one_row():
    q, k, v = (torch.randn(2, 6, 4, 8) for _ in range(3))
    with pytest.raises(ValueError, match="cu_seqlens: got it with 2 batch rows, expected one row"):
        linear_attention(q, k, v, cu_seqlens=torch.tensor([0, 6]))


def test_devices_are_made_to_wait_only_where_asked():
    """Reading a number would fail on this device without numbers, as it would wait on one that is busy."""
    q, k, v, dout = (torch.randn(2, 130, 4, 8, device="meta") for _ in range(4))
    offsets = np.array([0, 30, 130])
    for shape in ((4,), (2, 130, 4), (2, 130, 4, 8)):
        g = torch.zeros(shape, device="meta")
        checks.never_positive("log_decay", g)
        with debug.checks(), pytest.raises(RuntimeError, match="meta"):
            checks.never_positive("log_decay", g)
        with Work() as done:
            LinearAttentionForward(q, k, v, g, offsets, scale=1.0).summaries()
            LinearAttentionBackward(q, k, v, g, offsets, dout, scale=1.0).summaries()
            out, state = LinearAttentionForward(q, k, v, g, offsets, scale=1.0).finish(None)
            assert state is not None and out.shape == v.shape and state.shape == (2, 2, 4, 8, 8)
            backward = LinearAttentionBackward(q, k, v, g, offsets, dout, scale=1.0)
            dlog_decay = backward.finish(None, state, need_decay_gradient=True)[3]
            assert dlog_decay is not None and dlog_decay.shape == g.shape
        assert "aten::cumsum" not in done.names  # which CUDA refuses under torch.use_deterministic_algorithms


@pytest.mark.parametrize("decay", DECAYS)
def test_the_registered_operator_is_one(decay):
    this = problem(decay, documents=[20, 0, 9])
    x = this.inputs
    arguments = [x["q"], x["k"], x["v"], x.get("log_decay"), x["initial_state"][None]]
    leaves = [None if t is None else t.double().requires_grad_() for t in arguments]
    options = {"scale": 0.7, "return_state": True, "backend": "torch"}
    torch.library.opcheck(operators.forward, (*leaves, torch.tensor([0, 20, 20, 29])), options)


@pytest.mark.parametrize("decay", DECAYS)
def test_it_compiles_as_one_graph(decay):
    this = problem(decay)
    inputs: dict[str, Any] = {name: x.double().requires_grad_() for name, x in this.inputs.items()}

    def both(cu_seqlens: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor | None]:
        options = {"scale": 0.7, "return_state": True, "cu_seqlens": cu_seqlens}
        return linear_attention(**tensors, **options)  # pyright: ignore[reportArgumentType] tensors by name

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    out, state = compiled(this.options["cu_seqlens"], **inputs)
    assert state is not None
    true = this.solve(torch.float64)
    upstream = [this.gradients[name].double() for name in ("out", "state")]
    found = torch.autograd.grad([out, state], list(inputs.values()), upstream)
    for name, gradient in zip(inputs, found, strict=True):
        assert torch.equal(gradient, true[f"d{name}"])
    assert torch.equal(out, true["out"]) and torch.equal(state, true["state"])
    with pytest.raises(ValueError, match="cu_seqlens: got descending boundaries"):
        compiled(torch.tensor([0, 50, 40, 137]), **inputs)
