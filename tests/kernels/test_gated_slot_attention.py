"""Gated slot attention: the reference against a dense sum, the torch path and the operator against the reference."""

import re
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain.kernels import explain, gated_slot_attention
from longtrain.kernels.gated_slot_attention import SlotAttentionBackward, SlotAttentionForward, operators
from longtrain.kernels.linear_attention import chunking
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.gated_slot_attention_cases import Five, Problem, assert_close_to_reference, errors, problem
from tests.kernels.test_linear_attention import STRENGTHS, fill_empty_with_nan  # noqa: F401 (a fixture)

AXES = {
    "strength": STRENGTHS[:4],
    "heads": [(2, 2), (4, 2), (3, 1)],  # H, G
    "widths": [(5, 9, 7), (7, 1, 1), (2, 3, 17)],  # K, V, M
    "documents": [[90], [40, 40], [0, 1, 40, 0, 33, 0], [3] * 12],  # alike: rows of a batch
    "states": ["neither", "both"],
    "tile": [1, 3, 100],  # chunks
}


def dense(this: Problem, start: int, stop: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """One document as sums over all pairs of tokens, the decays between them summed up term by term; H = G."""
    inputs = {name: x.double() for name, x in this.inputs.items()}
    q, k, v, slot, g = (inputs[name][0, start:stop] for name in ("q", "k", "v", "slot", "log_decay"))
    steps = torch.arange(stop - start)
    between = (steps[:, None, None] >= steps) & (steps >= torch.arange(stop - start + 1)[:, None])  # i, j, t
    after = torch.where(between[..., None, None], g, 0).sum(2).exp()  # [T, T + 1, H, M]; j = 0: the initial state
    seen = torch.arange(stop - start + 1) <= steps[:, None] + 1
    after = torch.where(seen[..., None, None], after, 0)
    scores = torch.einsum("ihk,jhk,ijhm,jhm->ihm", q, k, after[:, 1:], slot)
    scores = scores + torch.einsum("ihk,hkm,ihm->ihm", q, inputs["keys"][n], after[:, 0])
    weights = torch.softmax(this.options["scale"] * scores, -1)
    out = torch.einsum("ihm,ijhm,jhm,jhv->ihv", weights, after[:, 1:], slot, v)
    out = out + torch.einsum("ihm,ihm,hmv->ihv", weights, after[:, 0], inputs["values"][n])
    keys = torch.einsum("jhk,jhm,jhm->hkm", k, after[-1, 1:], slot) + inputs["keys"][n] * after[-1, 0, :, None]
    values = torch.einsum("jhm,jhm,jhv->hmv", after[-1, 1:], slot, v)
    return out, keys, values + after[-1, 0, :, :, None] * inputs["values"][n]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_reference_is_the_dense_sum(strength):
    this = problem(strength, heads=(2, 2), documents=[9, 20])
    got = this.solve(torch.float64, "reference")
    out, keys, values = zip(dense(this, 0, 9, 0), dense(this, 9, 29, 1), strict=True)
    true = {"out": torch.cat(out)[None], "keys": torch.stack(keys), "values": torch.stack(values)}
    assert max(errors({name: got[name] for name in true}, true).values()) <= 1e-12


@cover(AXES)
def test_torch_is_the_reference(case, monkeypatch):
    case = dict(case)
    key_width, _, slots = case["widths"]
    tile = case.pop("tile")
    monkeypatch.setattr(chunking, "_CPU_TILE", tile * case["heads"][0] * 64 * (key_width + slots + 64) // 3 + 1)
    documents = case["documents"]
    this = problem(**case, batch=len(documents) if len(set(documents)) == 1 else None)
    assert_close_to_reference(this, torch.float64, "torch")
    assert_close_to_reference(this, torch.float32, "torch")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype):
    this = problem("fast", documents=[30, 20]).rounded(dtype)
    true, got = this.solve(torch.float64, "reference"), this.solve(dtype)
    assert {name for name, x in got.items() if x.dtype != dtype} == {"keys", "values"}
    found = errors(got, true)
    assert max(found.pop("keys"), found.pop("values")) <= 5e-6
    # Nothing is lost but the last rounding of each result, and that of the gradients given for the results.
    assert max(found.values()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("groups", [1, 2])
def test_strides_and_partial_gradients(groups):
    torch.manual_seed(0)
    q = torch.randn(2, groups, 6, 50, dtype=torch.float64).permute(0, 3, 1, 2)
    k = torch.randn(2, 50, 3, groups, 6, dtype=torch.float64)[:, :, 1]
    v = torch.randn(2, 1, 2, 7, dtype=torch.float64).expand(2, 50, 2, 7)
    slot = torch.randn(50, 2, 2, 5, dtype=torch.float64).transpose(0, 1)
    g = -torch.rand(2, 50, 5, 2, dtype=torch.float64).transpose(2, 3)
    dout = torch.randn(2, 1, 2, 1, dtype=torch.float64).expand(2, 50, 2, 7)

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out, _ = gated_slot_attention(*leaves)
        return out, *torch.autograd.grad(out, leaves, dout)

    given = (q, k, v, slot, g)
    plain = solve(*(x.contiguous() for x in given))
    for a, b in zip(solve(*given), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for n in range(5):
        leaves = [x.detach().requires_grad_(i == n) for i, x in enumerate(given)]
        gated_slot_attention(*leaves)[0].backward(dout)
        for i, x in enumerate(leaves):
            if i == n:
                torch.testing.assert_close(x.grad, plain[n + 1], rtol=1e-12, atol=1e-12)
            else:
                assert x.grad is None


@pytest.mark.parametrize("used", [["keys"], ["values"], ["keys", "values"]])
def test_a_loss_may_use_the_state_alone(used):
    this = problem(documents=[20, 0, 9])
    this.gradients = {name: this.gradients[name] for name in used}
    true = this.solve(torch.float64, "reference")
    assert (true["dq"] == 0).all() and max(errors(this.solve(torch.float64), true).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_empty_document_passes_its_state_through(backend):
    this = problem(documents=[0, 30, 0, 0])
    got = this.solve(torch.float64, backend)
    for n in (0, 2, 3):
        for name in ("keys", "values"):
            assert torch.equal(got[name][n], this.inputs[name][n].double())
            assert torch.equal(got[f"d{name}"][n], this.gradients[name][n].double())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_nothing_to_do(backend):
    for batch, documents in ((None, []), (None, [0]), (1, [0]), (3, [0]), (0, [5])):
        this = problem(documents=documents, batch=batch)
        got = this.solve(torch.float32, backend)
        assert got["out"].shape == this.inputs["v"].shape and got["keys"].shape == this.inputs["keys"].shape
        assert torch.equal(got["dkeys"], this.gradients["keys"])
        assert torch.equal(got["dvalues"], this.gradients["values"]) and not got["dslot"].any()


def test_the_state_may_be_left_out_autocast_changes_nothing_and_results_repeat():
    this = problem(documents=[70], batch=1, states="neither")
    given: dict[str, Any] = this.inputs
    out, state = gated_slot_attention(**given, scale=0.4)
    assert state is None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_slot_attention(**given, scale=0.4, return_state=True)[0], out)
    first, second = this.solve(torch.float32), this.solve(torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "runs 'torch'" in explain("gated_slot_attention")


@pytest.mark.parametrize("name", ["q", "k", "v", "slot", "log_decay"])
def test_nan_stays_in_its_document_and_head_and_behind_its_token(name):
    this = problem(heads=(2, 2), documents=[20, 25, 20], states="neither")
    clean = this.solve(torch.float64)
    this.inputs[name] = this.inputs[name].clone()
    this.inputs[name][0, 30, 1, 0] = torch.nan
    given: dict[str, Any] = {key: x.double().requires_grad_() for key, x in this.inputs.items()}
    if name == "log_decay":  # NaN is not above 0
        assert not (this.inputs[name] > 0).any()
    out, _ = gated_slot_attention(**given, **this.options)
    found = torch.autograd.grad(out, list(given.values()), this.gradients["out"].double())
    seen = torch.zeros(65, 2, dtype=torch.bool)
    seen[30:45, 1] = True  # tokens from it on, in its document and head
    assert out[0][seen].isnan().any() and torch.equal(out[0][~seen], clean["out"][0][~seen])
    seen[20:45, 1] = True  # gradients of its document
    for key, x in zip(given, found, strict=True):
        torch.testing.assert_close(x[0][~seen], clean[f"d{key}"][0][~seen], rtol=0, atol=0)


def decayed(log: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys * log.exp()[..., None, :], values * log.exp()[..., None]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("cut", [0, 1, 64, 99])
def test_two_pieces_joined_by_their_summaries_are_one(cut, groups, monkeypatch):
    """As two ranks, or two runs of one rank, would do it: only summaries pass between the pieces."""
    monkeypatch.setattr(chunking, "_CPU_TILE", 30_000)  # several tiles
    this = problem(heads=(2, groups), documents=[99], batch=2)
    inputs = {name: x.double() for name, x in this.inputs.items()}
    keys, values = inputs.pop("keys")[:, None], inputs.pop("values")[:, None]
    tensors = cast(Five, tuple(inputs.values()))
    dout, dkeys, dvalues = (this.gradients[name].double() for name in ("out", "keys", "values"))
    dkeys, dvalues = dkeys[:, None], dvalues[:, None]
    whole, pieces = np.array([0, 99]), np.array([0, cut, 99])
    out, weights, final = SlotAttentionForward(*tensors, whole, scale=0.4).finish((keys, values))
    assert final is not None
    backward = SlotAttentionBackward(*tensors, weights, whole, dout, scale=0.4)
    true_dvalues = backward.finish_values(values, dvalues)
    true = backward.finish(keys, dkeys)

    forward = SlotAttentionForward(*tensors, pieces, scale=0.4)
    log, added_keys, added_values = forward.summaries()
    kept_keys, kept_values = decayed(log, torch.cat((keys, keys), 1), torch.cat((values, values), 1))
    middle_keys, middle_values = (kept_keys + added_keys)[:, :1], (kept_values + added_values)[:, :1]
    entering = torch.cat((keys, middle_keys), 1), torch.cat((values, middle_values), 1)
    forward.local()
    found, found_weights, leaving = forward.finish(entering)
    assert leaving is not None
    assert torch.equal(SlotAttentionForward(*tensors, pieces, scale=0.4).finish(entering)[0], found)
    torch.testing.assert_close(found, out, rtol=1e-12, atol=1e-12)
    for a, b in zip(leaving, final, strict=True):
        torch.testing.assert_close(a[:, 1:], b, rtol=1e-12, atol=1e-12)

    backward = SlotAttentionBackward(*tensors, found_weights, pieces, dout, scale=0.4)
    torch.testing.assert_close(backward.log_transition(), log, rtol=0, atol=0)
    added = backward.value_summaries()
    dmiddle = decayed(log[:, 1:], dkeys, dvalues)[1] + added[:, 1:]
    backward.local_values(entering[1])
    dentering = backward.finish_values(entering[1], torch.cat((dmiddle, dvalues), 1))
    torch.testing.assert_close(dentering[:, :1], true_dvalues, rtol=1e-12, atol=1e-12)
    added = backward.key_summaries()
    dmiddle = decayed(log[:, 1:], dkeys, dvalues)[0] + added[:, 1:]
    backward.local_keys(entering[0])
    *gradients, dentering = backward.finish(entering[0], torch.cat((dmiddle, dkeys), 1))
    torch.testing.assert_close(dentering[:, 1:], dmiddle, rtol=1e-12, atol=1e-12)
    for a, b in zip((*gradients, dentering[:, :1]), true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Largest(TorchDispatchMode):
    """The size of operators' largest result, and how many ran."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_time_and_memory_are_linear_in_the_length(monkeypatch):
    monkeypatch.setattr(chunking, "_CPU_TILE", 2**14)
    seen = []
    for tokens in (512, 1024):
        this = problem(heads=(2, 2), widths=(16, 16, 16), documents=[tokens], batch=1, states="neither")
        tensors = cast(Five, tuple(this.inputs.values()))
        offsets = np.array([0, tokens])
        with Largest() as counted:
            out, weights, _ = SlotAttentionForward(*tensors, offsets, scale=0.4).finish(None)
            backward = SlotAttentionBackward(*tensors, weights, offsets, out, scale=0.4)
            backward.finish_values(None, None)
            backward.finish(None, None)
        seen.append(counted)
        assert counted.numbers <= tokens * 2 * 16  # that of an input
    assert seen[1].calls <= 2.1 * seen[0].calls


@pytest.mark.parametrize("states", ["both", "neither"])
def test_operator_is_sound(states):
    this = problem(documents=[9, 0, 21], states=states, widths=(3, 2, 4))
    inputs = {name: x.double().requires_grad_() for name, x in this.inputs.items()}
    initial = [inputs.pop(name)[None].detach().requires_grad_() for name in ("keys", "values") if name in inputs]
    offsets = this.options["cu_seqlens"]
    given = (*inputs.values(), *(initial or (None, None)), offsets)
    options = {"scale": 0.4, "return_state": states == "both", "backend": "torch"}
    # The weights' gradient is never taken: they are for backward alone, and autograd's check would ask for it.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operators.forward, given, options, test_utils=utilities)
    given = tuple(x if x is None else x.detach() for x in given)
    out, weights, keys, values = operators.forward(*given, **options)
    options.pop("return_state")
    dstates = (torch.randn_like(keys), torch.randn_like(values)) if states == "both" else (None, None)
    given = (torch.randn_like(out), *dstates, weights, *given)
    torch.library.opcheck(operators.backward, given, options)


def test_it_compiles_whole():
    this = problem(documents=[9, 0, 21])
    inputs: dict[str, Any] = {name: x.double() for name, x in this.inputs.items()}
    initial = inputs.pop("keys"), inputs.pop("values")

    def call(*tensors: Tensor) -> Tensor:
        out, state = gated_slot_attention(*tensors, initial_state=initial, return_state=True, **this.options)
        assert state is not None
        return 2 * out.sum(-1) + state[0].square().sum() + state[1].square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    results = []
    for function in (compiled, call):
        leaves = [x.clone().requires_grad_() for x in inputs.values()]
        out = function(*leaves)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


Q, V, SLOT = torch.zeros(1, 8, 2, 5), torch.zeros(1, 8, 4, 3), torch.zeros(1, 8, 4, 6)
A, C = torch.zeros(1, 4, 5, 6), torch.zeros(1, 4, 6, 3)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q": Q[0]}, "q: got shape (8, 2, 5), expected [B, T, G, K]"),
        ({"k": Q[..., :4]}, "k: got shape (1, 8, 2, 4), expected [B, T, G, K], with v's B and T and one K"),
        ({"k": Q.expand(1, 8, 2, 5)[:, :, :1].expand(1, 8, 3, 5)}, "k: got 3 heads, expected a divisor of v's 4 heads"),
        ({"v": V.long()}, "v: got dtype torch.int64"),
        ({"slot": SLOT[:, :, :2]}, "slot: got shape (1, 8, 2, 6), expected [B, T, H, M], with v's B, T and H"),
        ({"log_decay": SLOT[..., :5]}, "log_decay: got shape (1, 8, 4, 5), expected [B, T, H, M], as slot, = [1, 8, 4"),
        ({"log_decay": SLOT + 0.5}, "log_decay: got 0.5, expected no number above 0"),
        ({"log_decay": torch.zeros(1, 8, 4, 6, device="meta")}, "log_decay: got device meta, expected that of q, cpu"),
        ({"scale": "1"}, "scale: got '1', expected a finite number or None"),
        ({"return_state": 1}, "return_state: got 1, expected True or False"),
        ({"initial_state": A}, "initial_state: got Tensor, expected a pair of tensors (A, C) or None"),
        ({"initial_state": (C, A)}, "initial_state[0]: got shape (1, 4, 6, 3), expected [B, H, K, M] = [1, 4, 5, 6]"),
        ({"initial_state": (A, A)}, "initial_state[1]: got shape (1, 4, 5, 6), expected [B, H, M, V] = [1, 4, 6, 3]"),
        ({"cu_seqlens": torch.tensor([0, 9])}, "cu_seqlens: got 0 ... 9, expected boundaries from 0 to 8"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 8]), "initial_state": (A, C)},
            "initial_state[0]: got shape (1, 4, 5, 6), expected [N, H, K, M] = [2, 4, 5, 6]",
        ),
        ({"backend": "chunked"}, "backend: got 'chunked', expected for gated_slot_attention on cpu: 'auto', 'torch'"),
        ({"backend": "triton"}, "backend: got 'triton' ("),
    ],
)
def test_bad_input_is_refused_by_name(given, message, backend):
    call: dict[str, Any] = {"q": Q, "k": Q, "v": V, "slot": SLOT, "log_decay": SLOT, "backend": backend, **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        gated_slot_attention(**call)
