"""Cross-entropy of a linear head by tiles against the float64 reference, which is itself checked against PyTorch's."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain import debug
from longtrain.kernels import explain, linear_cross_entropy
from longtrain.kernels.linear_cross_entropy import loop, operators, torch_impl
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.linear_cross_entropy_cases import errors, problem

AXES = {
    "sizes": [(70, 24, 130), (130, 5, 70), (33, 16, 1), (1, 7, 300)],  # N, D, vocabulary
    "ignored": ["none", "some", "all"],
    "reduction": ["sum", "mean", "none"],
    "z_loss": [0.0, 0.05],
    "softcap": [None, 4.0],
    "ignore_index": [-100, 0],
    "tile": [(16, 48), (64, 17), (1000, 1000)],  # tokens, vocabulary
}


@pytest.fixture(autouse=True)
def fill_empty_with_nan() -> Iterator[None]:
    """torch.empty gives NaN, so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def half_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a GPU: operands in half precision, float32 products."""
    plain = loop.multiply

    def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        assert a.dtype == b.dtype and out.dtype == torch.float32
        plain(a.float(), b.float(), out, add=add)

    def dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
        return hidden.dtype, torch.float32

    monkeypatch.setattr(loop, "multiply", multiply)
    monkeypatch.setattr(loop, "dtypes", dtypes)


@cover({name: AXES[name] for name in ("sizes", "ignored", "reduction", "z_loss", "softcap", "ignore_index")})
def test_reference_is_pytorchs(case):
    this = problem(**case)
    got = this.solve(torch.float64, "reference")
    hidden, weight = (x.double().requires_grad_() for x in (this.hidden, this.weight))
    logits = F.linear(hidden, weight)
    if case["softcap"] is not None:
        logits = case["softcap"] * (logits / case["softcap"]).tanh()
    losses = F.cross_entropy(logits, this.targets, ignore_index=case["ignore_index"], reduction="none")
    counts = this.targets != case["ignore_index"]
    losses = losses + case["z_loss"] * (logits.exp().sum(1).log() ** 2) * counts
    loss = losses if case["reduction"] == "none" else losses.sum()
    if case["reduction"] == "mean":
        loss = loss / max(1, int(counts.sum()))
    gradients = torch.autograd.grad(loss, (hidden, weight), this.dloss.double())
    true = dict(zip(got, (loss, *gradients), strict=True))
    assert max(errors(got, true).values()) <= 1e-12
    if case["ignored"] == "all":
        assert all((x == 0).all() for x in got.values())


@cover(AXES)
def test_torch_is_the_reference(case, monkeypatch):
    case = dict(case)
    monkeypatch.setattr(torch_impl, "_CPU_TILE", case.pop("tile"))
    this = problem(**case)
    true = this.solve(torch.float64, "reference")
    assert max(errors(this.solve(torch.float64), true).values()) <= 1e-10
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32), true).items():
        assert error <= max(4 * allowed[name], 1e-6), name


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype, backend):
    this = problem(z_loss=0.01, softcap=8.0).rounded(dtype)
    found = errors(got := this.solve(dtype, backend), this.solve(torch.float64, "reference"))
    assert [x.dtype for x in got.values()] == [torch.float32, dtype, dtype]
    assert found["loss"] <= 1e-6 and max(found.values()) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("sizes", [(700, 24, 130), (130, 24, 700)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_operands_lose_one_rounding(dtype, sizes, monkeypatch):
    """As on a GPU; also where the gradients are 1e-4 times as large, of which float16 itself would lose most digits."""
    half_operands(monkeypatch)
    monkeypatch.setattr(torch_impl, "_CPU_TILE", (64, 64))
    this = problem(sizes, z_loss=0.01, softcap=8.0).rounded(dtype)
    true = this.solve(torch.float64, "reference")
    found = errors(this.solve(dtype, "torch"), true)
    assert found["loss"] <= 1e-6 and max(found.values()) <= torch.finfo(dtype).eps
    hidden, weight = (x.to(dtype).requires_grad_() for x in (this.hidden, this.weight))
    losses, lse = operators.forward(
        hidden, weight, this.targets, ignore_index=-100, z_loss=0.01, softcap=8.0, backend="torch"
    )
    options = loop.Options(ignore_index=-100, z_loss=0.01, softcap=8.0)
    small = this.dloss * 1e-4
    small[3] = torch.inf  # one token's trouble is not that of the unit
    this.targets[3] = -100
    whole = loop.backward(
        small,
        hidden.detach(),
        weight.detach(),
        this.targets,
        lse,
        options,
        torch_impl.TorchSteps(),
        (64, 64),
        need_hidden=True,
        need_weight=True,
    )
    this.dloss = this.dloss * 1e-4
    true = this.solve(torch.float64, "reference")
    got = dict(zip(("dhidden", "dweight"), whole, strict=True))
    found = errors(got, {name: true[name] for name in got})  # type: ignore[arg-type]
    assert max(found.values()) <= 2 * torch.finfo(dtype).eps
    assert losses.dtype == torch.float32


def test_several_dtypes_and_shapes():
    this = problem()
    hidden, weight = this.hidden.reshape(7, 2, 5, 24).double().requires_grad_(), this.weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, this.targets.reshape(7, 2, 5), reduction="none")
    assert losses.shape == (7, 2, 5) and losses.dtype == torch.float64
    dhidden, dweight = torch.autograd.grad(losses, (hidden, weight), this.dloss.reshape(7, 2, 5).double())
    true = this.solve(torch.float64, "reference")
    got = {"loss": losses.flatten(), "dhidden": dhidden.flatten(0, 2), "dweight": dweight}
    found = errors(got, true)
    assert dhidden.dtype == torch.float64 and dweight.dtype == torch.float32
    assert max(found["loss"], found["dhidden"]) <= 1e-12 and found["dweight"] <= 1e-7
    one = linear_cross_entropy(hidden[0, 0, 1], weight, this.targets[1], reduction="none")
    assert one.shape == () and float((one - losses[0, 0, 1]).detach().abs()) <= 1e-14


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_no_tokens(shape, reduction, backend):
    hidden, weight = torch.randn(*shape, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, backend=backend)
    assert loss.shape == (shape if reduction == "none" else ()) and (loss == 0).all()
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), torch.ones_like(loss))
    assert dhidden.shape == hidden.shape and (dweight == 0).all()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [(70, 24, 130), (130, 24, 70)])
def test_a_token_that_is_not_a_number_stays_alone(sizes, z_loss, monkeypatch):
    monkeypatch.setattr(torch_impl, "_CPU_TILE", (32, 32))
    this = problem(sizes, ignored="none", z_loss=z_loss)
    clean = this.solve(torch.float32)
    others = torch.arange(sizes[0]) != 5
    for bad in (torch.nan, torch.inf):
        this.hidden[5, 2] = bad
        got = this.solve(torch.float32)
        assert not got["loss"][5].isfinite() and not got["dhidden"][5].isfinite().any()
        assert torch.equal(got["loss"][others], clean["loss"][others])
        assert torch.equal(got["dhidden"][others], clean["dhidden"][others])
        # Ignored, it reaches nothing at all.
        targets, this.targets = this.targets, torch.where(others, this.targets, -100)
        ignored = this.solve(torch.float32)
        assert (ignored["loss"][5] == 0) and (ignored["dhidden"][5] == 0).all()
        this.hidden[5, 2] = 0
        assert torch.equal(ignored["dweight"], this.solve(torch.float32)["dweight"])
        this.targets = targets


def test_extreme_logits():
    """Far beyond what exp can hold, and none at all."""
    hidden, weight = torch.eye(4), torch.tensor([[3e4, 0, -3e4, 9], [0, 0, 0, -9], [-3e4, 0, 3e4, 2.0]])
    weight = F.pad(weight, (0, 0, 0, 200), value=-torch.inf)  # more than a tile of impossible tokens
    for order in (torch.arange(203), torch.arange(202, -1, -1)):
        targets = order.argsort()[torch.tensor([0, 1, 2, 1])]
        losses = linear_cross_entropy(hidden * 1.0, weight[order].nan_to_num(neginf=-3e38), targets, reduction="none")
        assert losses.tolist()[:3] == pytest.approx([0, 1.0986123, 0]) and losses[3] == pytest.approx(18 + 9.12e-4)


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
@pytest.mark.parametrize("sizes", [(70, 24, 130), (130, 24, 70)])
def test_only_some_inputs_need_gradients(sizes, wanted, monkeypatch):
    monkeypatch.setattr(torch_impl, "_CPU_TILE", (32, 32))
    this = problem(sizes)
    true = this.solve(torch.float64, "reference")[f"d{wanted}"]
    inputs = {name: x.double().requires_grad_(name == wanted) for name, x in vars(this).items() if name in NAMES}
    losses = linear_cross_entropy(**inputs, targets=this.targets, reduction="none")
    losses.backward(this.dloss.double())
    assert float((inputs[wanted].grad - true).abs().max()) <= 1e-12
    assert all(inputs[name].grad is None for name in NAMES if name != wanted)


NAMES = ("hidden", "weight")


def test_strides_do_not_matter():
    this = problem()
    plain = this.solve(torch.float64)
    hidden = torch.randn(24, 2, 70, dtype=torch.float64).permute(2, 1, 0)[:, 1]
    hidden = hidden.copy_(this.hidden).requires_grad_()
    weight = this.weight.double().t().contiguous().t().requires_grad_()
    targets = torch.stack([this.targets, this.targets], 1)[:, 0]
    losses = linear_cross_entropy(hidden, weight, targets, reduction="none")
    dloss = this.dloss.double()[:, None].expand(70, 3)[:, 1]
    gradients = torch.autograd.grad(losses, (hidden, weight), dloss)
    got = dict(zip(plain, (losses, *gradients), strict=True))
    assert max(errors(got, plain).values()) <= 1e-12
    # One gradient for all, as a sum hands it down.
    same = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, reduction="none").sum(), weight)[0]
    total = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    assert torch.equal(same, total)


def test_autocast_changes_nothing_and_results_repeat():
    this = problem(z_loss=0.1)
    plain = this.solve(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        again = this.solve(torch.float32)
        exact = linear_cross_entropy(this.hidden, this.weight, this.targets, **this.options, backend="reference")
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert torch.equal(exact, this.solve(torch.float32, "reference")["loss"])


def test_compiles_whole_and_with_symbolic_sizes():
    def solve(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden * 2, weight, targets, reduction="none", z_loss=0.1, softcap=5.0)

    compiled = torch.compile(solve, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in ((70, 24, 130), (55, 24, 90)):
        this = problem(sizes)
        results = []
        for function in (solve, compiled):
            hidden, weight = (x.clone().requires_grad_() for x in (this.hidden, this.weight))
            loss = function(hidden, weight, this.targets)
            results.append((loss, *torch.autograd.grad(loss, (hidden, weight), this.dloss)))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", [(True, True), (True, False)])
def test_operators_are_what_pytorch_expects(wanted):
    this = problem()
    hidden, weight = (
        x.clone().requires_grad_(need) for x, need in zip((this.hidden, this.weight), wanted, strict=True)
    )
    options: dict[str, Any] = {"ignore_index": -100, "z_loss": 0.1, "softcap": 5.0, "backend": "torch"}
    torch.library.opcheck(operators.forward, (hidden, weight, this.targets), options)
    hidden, weight = hidden.detach(), weight.detach()
    _, lse = operators.forward(hidden, weight, this.targets, **options)
    options |= {"need_hidden": wanted[0], "need_weight": wanted[1]}
    torch.library.opcheck(operators.backward, (this.dloss, hidden, weight, this.targets, lse), options)


def test_blocks_cover_all_and_are_even():
    for count, largest in ((0, 8192), (1, 8192), (128_256, 8192), (8193, 8192), (100, 7), (131_072, 8192)):
        found = loop.blocks(count, largest)
        assert [i for block in found for i in range(*block)] == list(range(count))
        assert all(0 < stop - start <= largest for start, stop in found)
    assert loop.blocks(128_256, 8192)[:2] == [(0, 8064), (8064, 16128)] and len(loop.blocks(128_256, 8192)) == 16


def test_a_target_nobody_checked_has_no_loss():
    """As on a GPU, where the check would wait."""
    this = problem(ignored="none")
    this.targets[4] = 130
    options = loop.Options(ignore_index=-100, z_loss=0.0, softcap=None)
    losses, _ = loop.forward(this.hidden, this.weight, this.targets, options, torch_impl.TorchSteps(), (32, 32))
    assert losses.isnan().nonzero().flatten().tolist() == [4]


BAD = [
    ("hidden", [[1.0]], "hidden: got list, expected a tensor"),
    ("hidden", torch.zeros(4, 6, dtype=torch.int64), "hidden: got dtype torch.int64, expected float64, float32"),
    ("hidden", torch.zeros(()), r"hidden: got shape \(\), expected \[..., D\]"),
    ("hidden", torch.zeros(4, 0), r"hidden: got shape \(4, 0\), expected \[..., D\] with D >= 1"),
    ("weight", torch.zeros(5, 7), r"weight: got shape \(5, 7\), expected \[vocabulary, D\] = \[any >= 1, 6\]"),
    ("weight", torch.zeros(0, 6), r"weight: got shape \(0, 6\), expected"),
    ("weight", torch.zeros(6), r"weight: got shape \(6,\), expected \[vocabulary, D\]"),
    ("weight", torch.zeros(5, 6, device="meta"), "weight: got device meta, expected that of hidden, cpu"),
    ("targets", torch.zeros(4), "targets: got dtype torch.float32, expected an int64 tensor"),
    ("targets", torch.zeros(4, dtype=torch.int32), "targets: got dtype torch.int32, expected an int64"),
    ("targets", [1, 2], "targets: got list, expected an int64"),
    ("targets", torch.zeros(3, dtype=torch.int64), r"targets: got shape \(3,\), expected that of hidden .*\(4,\)"),
    ("targets", torch.tensor([0, 5, 1, 1]), "targets: got 5, expected 0 to 4 or ignore_index -100"),
    ("targets", torch.tensor([0, -1, 1, 1]), "targets: got -1, expected 0 to 4"),
    ("ignore_index", 1.5, "ignore_index: got 1.5, expected an integer"),
    ("reduction", "average", "reduction: got 'average', expected one of 'sum', 'mean', 'none'"),
    ("z_loss", -1.0, "z_loss: got -1.0, expected a number of at least 0"),
    ("z_loss", None, "z_loss: got None, expected a number"),
    ("z_loss", float("nan"), "z_loss: got nan, expected"),
    ("softcap", 0.0, "softcap: got 0.0, expected a number above 0 or None"),
    ("softcap", "30", "softcap: got '30', expected"),
    ("backend", "cuda", "backend: got 'cuda', expected for linear_cross_entropy on cpu: 'auto'"),
    ("backend", "triton", "backend: got 'triton' .*, expected"),
]


@pytest.mark.parametrize(("name", "value", "says"), BAD)
def test_bad_input_is_refused(name, value, says):
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(5, 6),
        "targets": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=says):
        linear_cross_entropy(**{**arguments, name: value})
    assert linear_cross_entropy(**arguments) == pytest.approx(4 * 1.6094379)


def test_defaults_and_debug():
    assert "runs 'torch'" in explain("linear_cross_entropy")
    this = problem()
    with debug.checks():
        loss = linear_cross_entropy(this.hidden, this.weight, this.targets)
    assert torch.equal(loss, linear_cross_entropy(this.hidden, this.weight, this.targets, reduction="none").sum())
