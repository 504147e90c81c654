"""The gated delta rule by chunks against the float64 reference, which is itself checked against the equation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.kernels import explain, gated_delta_rule
from longtrain.kernels.gated_delta_rule import containment, operators
from longtrain.kernels.linear_attention import chunking, decays
from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)
from tests.kernels.gated_delta_rule_cases import (
    GATES,
    PLACES,
    assert_float32_loses_little,
    assert_pieces_are_the_whole,
    own_gradients,
    problem,
    problem_of,
)
from tests.kernels.reach import assert_only_who_sees_it_is_reached, spoil
from tests.kernels.test_linear_attention import STRENGTHS, errors, fill_empty_with_nan  # noqa: F401 (a fixture)

AXES = {
    "gate": GATES,
    "strength": STRENGTHS[:4],
    "heads": [(3, 3), (4, 2), (3, 1)],  # H, G
    "widths": [(5, 9), (7, 1)],  # K, V
    "documents": [[150], [64, 64], [0, 1, 90, 0, 33, 64, 17, 0], [3] * 20],
    "states": ["neither", "both"],
    "betas": ["sigmoid", "any"],
    "form": ["matrix", "halving"],  # of what is computed within chunks
    "tile": [1, 3, 100],  # chunks
}


def possible(case: dict[str, Any]) -> bool:
    return not (case["gate"] == "none" and case["strength"] != "slow")


def by_equation(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One document [T, ...] with every transition as a matrix, (I - beta_t k_t k_t^T) diag(exp(g_t)), written out."""
    tokens, heads = v.shape[:2]
    q, k = (x.repeat_interleave(heads // x.shape[1], 1) for x in (q, k))
    g = torch.zeros_like(k) if g is None else (g[..., None] if g.ndim == 2 else g).expand(k.shape)
    eye = torch.eye(k.shape[2], dtype=k.dtype)
    outer = torch.einsum("thk,thl->thkl", k, k)
    transitions = (eye - beta[..., None, None] * outer) @ torch.diag_embed(g.exp())
    added = torch.einsum("th,thk,thv->thkv", beta, k, v)
    outputs = []
    for t in range(tokens):
        state = transitions[t] @ state + added[t]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
    return torch.stack(outputs), state


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("gate", GATES)
def test_reference_is_the_equation(gate, strength):
    this = problem(gate, strength, documents=[9, 20], betas="any")
    got = this.solve(torch.float64, "reference")
    inputs = {name: x.double().requires_grad_() for name, x in this.inputs.items()}
    parts = []
    for n, start, stop in ((0, 0, 9), (1, 9, 29)):
        g = inputs.get("log_decay")
        q, k, v, beta = (inputs[name][0, start:stop] for name in ("q", "k", "v", "beta"))
        parts.append(by_equation(q, k, v, beta, None if g is None else g[0, start:stop], inputs["initial_state"][n]))
    out = 0.7 * torch.cat([out for out, _ in parts])[None]
    state = torch.stack([state for _, state in parts])
    upstream = [this.gradients[name].double() for name in ("out", "state")]
    found = torch.autograd.grad([out, state], list(inputs.values()), upstream)
    true = {"out": out, "state": state} | {f"d{name}": x for name, x in zip(inputs, found, strict=True)}
    assert max(errors(got, true).values()) <= 1e-12


@cover(AXES, possible)
def test_torch_is_the_reference(case, monkeypatch):
    case = dict(case)
    if case.pop("form") == "halving":
        monkeypatch.setattr(decays, "_MATRIX_DEVICES", ())
    monkeypatch.setattr(
        chunking, "_CPU_TILE", case.pop("tile") * case["heads"][0] * 64 * (sum(case["widths"]) + 64) // 3 + 1
    )
    this = problem_of(case)
    true = this.solve(torch.float64, "reference")
    assert max(errors(this.solve(torch.float64), true).values()) <= 1e-10
    assert_float32_loses_little(this.solve(torch.float32), this, true)


@pytest.mark.parametrize("gate", ["token", "channel"])
def test_all_may_be_forgotten(gate):
    this = problem(gate, "forgets")
    true, got = this.solve(torch.float64, "reference"), this.solve(torch.float64)
    assert (got["dlog_decay"] == 0).all() and max(errors(got, true).values()) <= 1e-10


@pytest.mark.parametrize("form", ["matrix", "halving"])
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("cut", [0, 1, 64, 99, 150])
@pytest.mark.parametrize("gate", GATES)
def test_two_pieces_joined_by_their_summaries_are_one(gate, cut, groups, form, monkeypatch):
    monkeypatch.setattr(chunking, "_CPU_TILE", 30_000)  # several tiles
    if form == "halving":
        monkeypatch.setattr(decays, "_MATRIX_DEVICES", ())
    assert_pieces_are_the_whole(gate, cut, groups, "torch", torch.float64)


@pytest.mark.parametrize("gate", GATES)
def test_queries_and_keys_may_be_shared_differently(gate):
    this = problem(gate)
    this.inputs["q"] = torch.randn(1, 137, 4, 5, generator=torch.Generator().manual_seed(1))
    assert this.inputs["k"].shape[2] == 2
    assert max(errors(this.solve(torch.float64), this.solve(torch.float64, "reference")).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, backend):
    this = problem(strength="fast").rounded(dtype)
    true, got = this.solve(torch.float64, "reference"), this.solve(dtype, backend)
    assert {name for name, x in got.items() if x.dtype != dtype} == {"state"} and got["state"].dtype == torch.float32
    found = errors(got, true)
    assert found.pop("state") <= 5e-6
    # Nothing is lost but the last rounding of each result.
    assert max(found.values()) <= torch.finfo(dtype).eps


def test_inputs_of_several_dtypes():
    this = problem()
    true = this.solve(torch.float64, "reference")
    inputs: dict[str, Any] = dict(this.inputs)
    inputs["k"] = inputs["k"].double()
    out, state = gated_delta_rule(**inputs, **this.options, return_state=True)
    assert out.dtype == torch.float32 and state is not None and state.dtype == torch.float64
    assert max(errors({"state": state}, {"state": true["state"]}).values()) <= 1e-14


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_changes_nothing(backend):
    this = problem()
    plain = this.solve(torch.float32, backend)
    with torch.autocast("cpu", torch.bfloat16):
        inputs: dict[str, Any] = this.inputs
        out, state = gated_delta_rule(**inputs, **this.options, return_state=True, backend=backend)
    assert state is not None and torch.equal(out, plain["out"]) and torch.equal(state, plain["state"])


def test_strides_do_not_matter():
    torch.manual_seed(0)
    # Heads or tokens last in memory, a slice of something wider, and numbers that all tokens share.
    q = torch.randn(2, 4, 6, 83, dtype=torch.float64).permute(0, 3, 1, 2)
    k = 0.4 * torch.randn(2, 83, 4, 3, 6, dtype=torch.float64)[:, :, :, 1]
    v = torch.randn(2, 1, 4, 7, dtype=torch.float64).expand(2, 83, 4, 7)
    beta = torch.rand(4, 2, 83, dtype=torch.float64).permute(1, 2, 0)
    g = -torch.rand(83, 4, 2, dtype=torch.float64).permute(2, 0, 1)
    initial = torch.randn(4, 2, 7, 6, dtype=torch.float64).permute(1, 0, 3, 2)
    dout = torch.randn(2, 1, 4, 1, dtype=torch.float64).expand(2, 83, 4, 7)
    dstate = torch.randn(7, 6, 4, 2, dtype=torch.float64).permute(3, 2, 1, 0)

    def solve(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors[:6]]
        out, state = gated_delta_rule(*leaves[:5], initial_state=leaves[5], return_state=True)
        assert state is not None
        return out, state, *torch.autograd.grad([out, state], leaves, tensors[6:])

    inputs = (q, k, v, beta, g, initial, dout, dstate)
    for strided, plain in zip(solve(*inputs), solve(*(x.contiguous() for x in inputs)), strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", [["q"], ["beta"], ["log_decay"], ["initial_state"], ["k", "v"]])
@pytest.mark.parametrize("gate", ["token", "channel"])
def test_only_some_inputs_need_gradients(gate, wanted):
    this = problem(gate)
    true = this.solve(torch.float64)
    inputs: dict[str, Any] = {name: x.double().requires_grad_(name in wanted) for name, x in this.inputs.items()}
    out, state = gated_delta_rule(**inputs, **this.options, return_state=True)
    assert state is not None
    torch.autograd.backward([out, state], [this.gradients["out"].double(), this.gradients["state"].double()])
    for name, x in inputs.items():
        assert torch.equal(x.grad, true[f"d{name}"]) if name in wanted else x.grad is None


@pytest.mark.parametrize("gate", GATES)
def test_a_loss_may_use_one_result_alone(gate):
    for name in ("out", "state"):
        this = problem(gate)
        del this.gradients[name]
        true = this.solve(torch.float64, "reference")
        assert max(errors(this.solve(torch.float64), true).values()) <= 1e-10


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_an_empty_document_passes_its_state_through(gate, backend):
    this = problem(gate, documents=[0, 30, 0, 0])
    got = this.solve(torch.float64, backend)
    for n in (0, 2, 3):
        assert torch.equal(got["state"][n], this.inputs["initial_state"][n].double())
        assert torch.equal(got["dinitial_state"][n], this.gradients["state"][n].double())
    del this.inputs["initial_state"]
    assert (this.solve(torch.float64, backend)["state"][[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_do(gate, backend):
    for batch, documents in ((None, []), (None, [0]), (1, [0]), (3, [0]), (0, [5])):
        this = problem(gate, documents=documents, batch=batch)
        got = this.solve(torch.float32, backend)
        assert got["out"].shape == this.inputs["v"].shape and got["state"].shape == this.gradients["state"].shape
        assert torch.equal(got["dinitial_state"], this.gradients["state"])


def test_the_state_may_be_left_out_and_results_repeat():
    this = problem()
    inputs: dict[str, Any] = this.inputs
    out, state = gated_delta_rule(**inputs, **this.options)
    assert state is None and torch.equal(out, gated_delta_rule(**inputs, **this.options, return_state=True)[0])
    first, second = this.solve(torch.float32), this.solve(torch.float32)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_defaults():
    this = problem("none", documents=[70], batch=2)
    inputs: dict[str, Any] = {name: this.inputs[name].double() for name in ("q", "k", "v", "beta")}
    out, state = gated_delta_rule(**inputs)
    assert state is None
    torch.testing.assert_close(out, gated_delta_rule(**inputs, scale=5**-0.5, backend="reference")[0])
    assert "runs 'torch'" in explain("gated_delta_rule")


@pytest.mark.parametrize("form", ["matrix", "halving"])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_nan_and_inf_reach_who_sees_them(gate, seed, form, monkeypatch):
    if form == "halving":  # and nobody looks whether anything is not finite, as on an accelerator
        monkeypatch.setattr(decays, "_MATRIX_DEVICES", ())
        monkeypatch.setattr(containment, "all_finite", lambda *tensors: False)
    this = problem(gate, heads=(3, 3), documents=[70, 90, 66])
    spoilt = spoil(this, PLACES + ([("log_decay", torch.nan)] if gate != "none" else []), seed=seed)
    assert_only_who_sees_it_is_reached(this, spoilt, "torch", torch.float64, spared=own_gradients(spoilt))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("packed", [True, False])
def test_the_operator_keeps_the_rules_of_its_kind(gate, packed):
    documents = [20, 0, 50] if packed else [70]
    this = problem(gate, documents=documents, batch=None if packed else 2)
    inputs = {name: x.requires_grad_() for name, x in this.inputs.items()}
    offsets = torch.tensor([0, *documents]).cumsum(0)
    initial = inputs["initial_state"][None] if packed else inputs["initial_state"][:, None]
    tensors = (*(inputs[name] for name in ("q", "k", "v", "beta")), inputs.get("log_decay"), initial.detach(), offsets)
    for return_state in (True, False):
        options = {"scale": 0.7, "return_state": return_state, "backend": "torch"}
        torch.library.opcheck(operators.forward, tensors, options)
    plain = tuple(None if x is None else x.detach() for x in tensors)
    dout, dstate = torch.randn_like(inputs["v"]), torch.randn_like(initial)
    for needed in (True, False):
        options = {"scale": 0.7, "backend": "torch", "need_decay": needed and gate != "none", "need_state": needed}
        torch.library.opcheck(operators.backward, (dout, dstate if needed else None, *plain), options)


def test_compiled_as_one_graph_whatever_the_documents():
    this = problem()
    inputs: dict[str, Any] = {name: x.double().requires_grad_() for name, x in this.inputs.items()}
    graphs = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    def call(cu_seqlens: Tensor) -> Tensor:
        out, state = gated_delta_rule(**inputs, scale=0.7, cu_seqlens=cu_seqlens, return_state=True)
        assert state is not None
        return (out * this.gradients["out"]).sum() + (state * this.gradients["state"]).sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    recorded = torch.compile(call, fullgraph=True, backend=backend)
    for lengths in ([40, 0, 97], [1, 100, 36]):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        recorded(ends)
        found = torch.autograd.grad(compiled(ends), list(inputs.values()))
        for got, true in zip(found, torch.autograd.grad(call(ends), list(inputs.values())), strict=True):
            torch.testing.assert_close(got, true, rtol=1e-12, atol=1e-12)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="boundaries from 0 to 137"):
        compiled(torch.tensor([0, 40, 40, 130]))
    q, k, v, beta = (torch.randn(2, 70, *shape) for shape in ((3, 4), (3, 4), (3, 4), (3,)))
    plain = torch.compile(lambda: gated_delta_rule(q, k, v, beta)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(plain(), gated_delta_rule(q, k, v, beta)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 137, 3, 5)}, "q: got 3 heads, expected a divisor of v's 4 heads"),
        ({"k": torch.zeros(1, 137, 2, 6)}, r"k: got shape \(1, 137, 2, 6\), expected \[B, T, G, K\]"),
        ({"v": torch.zeros(1, 137, 4)}, r"v: got shape \(1, 137, 4\), expected \[B, T, H, V\]"),
        ({"v": torch.zeros(1, 137, 4, 9).int()}, "v: got dtype torch.int32, expected float64"),
        ({"beta": torch.zeros(1, 137, 2)}, r"beta: got shape \(1, 137, 2\), expected \[B, T, H\] = \[1, 137, 4\]"),
        ({"beta": 0.5}, "beta: got float, expected a tensor"),
        ({"log_decay": torch.zeros(4)}, r"log_decay: got shape \(4,\), expected None or \[B, T, H\]"),
        ({"log_decay": torch.full((1, 137, 4), 0.5)}, "log_decay: got 0.5, expected no number above 0"),
        ({"log_decay": -1.0}, "log_decay: got float, expected None or a tensor"),
        ({"log_decay": torch.zeros(1, 137, 4).int()}, "log_decay: got dtype torch.int32"),
        (
            {"initial_state": torch.zeros(2, 4, 5, 9)},
            r"initial_state: got shape \(2, 4, 5, 9\), expected \[N, H, K, V\]",
        ),
        ({"beta": torch.zeros(1, 137, 4, device="meta")}, "beta: got device meta, expected that of q, cpu"),
        ({"cu_seqlens": torch.tensor([0, 100])}, "cu_seqlens: got 0 ... 100, expected boundaries from 0 to 137"),
        ({"cu_seqlens": torch.tensor([0, 90, 40, 137])}, "cu_seqlens: got descending boundaries"),
        ({"cu_seqlens": torch.tensor([0.0, 137.0])}, "cu_seqlens: got dtype torch.float32, expected int32 or int64"),
        ({"return_state": 1}, "return_state: got 1, expected True or False"),
        ({"scale": "1"}, "scale: got '1', expected a finite number or None"),
        ({"backend": "chunked"}, "backend: got 'chunked', expected for gated_delta_rule on cpu: 'auto', 'torch'"),
        ({"backend": "triton"}, "backend: got 'triton' .Triton "),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_what_it_cannot_do_is_refused(change, message, backend):
    this = problem()
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**({**this.inputs, **this.options, "backend": backend} | change))


def test_packed_rows_are_refused():
    this = problem(documents=[20], batch=2)
    inputs: dict[str, Any] = this.inputs
    with pytest.raises(ValueError, match="cu_seqlens: got it with 2 batch rows, expected one row"):
        gated_delta_rule(**inputs, cu_seqlens=torch.tensor([0, 20]))
