"""The convolution over ranks against one device's: halos from any ranks, the way back, what travels and is refused."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longtrain.kernels import causal_conv1d
from longtrain.parallel import SequenceShard, conv1d, sequence_parallel_conv1d
from longtrain.parallel.communication import MessageCounter, count_messages
from tests.distributed import run_distributed
from tests.parallel.comparing import relative_error, squared_errors, world_group
from tests.parallel.sequences import random

KEPT = [torch.ops.longtrain.sequence_parallel_conv1d.default]
CHANNELS = 5


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors."""

    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    width: int = 4
    activation: Literal["silu"] | None = "silu"
    bias: bool = True
    batch: int = 1


CASES = (
    Case(),
    Case(layout="zigzag", batch=2),
    Case(layout="zigzag", activation=None, bias=False),
    Case(width=1),
    Case(layout="zigzag", width=2, activation=None),
    # Documents that begin inside a halo, on the cuts between ranks and just before and after them; empty ones.
    Case(documents=(0, 0, 9, 10, 18, 18, 19, 27, 28, 37)),
    Case(layout="zigzag", documents=(0, 4, 5, 9, 11, 18, 19, 20, 29, 37)),
    Case(layout="zigzag", documents=tuple(range(38))),
    # Runs shorter than the halo: it comes from several ranks, this one perhaps; ranks without tokens.
    Case(tokens=9, width=7, batch=2),
    Case(tokens=11, width=7, layout="zigzag"),
    Case(tokens=11, width=16, layout="zigzag", documents=(0, 1, 9, 11)),
    Case(tokens=8, width=4, layout="zigzag", documents=(0, 2, 8)),
    Case(tokens=3, width=3),
    Case(tokens=2, width=4, layout="zigzag"),
    Case(tokens=1, layout="zigzag"),
    Case(tokens=0),
)


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: the call's arguments and the gradient of its result."""
    rows = (case.batch, case.tokens, CHANNELS)
    inputs = {"x": random(rows, 1), "weight": random((CHANNELS, case.width), 2), "dout": random(rows, 3)}
    return inputs | ({"bias": random((CHANNELS,), 4)} if case.bias else {})


def with_gradients(
    convolve: Callable[..., Tensor], inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """y and all gradients of `convolve(x, weight, bias)`."""
    leaves = {n: x.to(dtype, copy=True).requires_grad_() for n, x in inputs.items() if n != "dout"}
    out = convolve(leaves["x"], leaves["weight"], leaves.get("bias"))
    assert out.dtype == dtype
    dout = inputs["dout"].to(dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
    assert all(gradient.dtype == dtype for gradient in gradients)
    return {"out": out.detach()} | {"d" + name: x for name, x in zip(leaves, gradients, strict=True)}


def on_one_device(case: Case, dtype: torch.dtype = torch.float64, backend: str = "reference") -> dict[str, Tensor]:
    bounds = None if case.documents is None else torch.tensor(case.documents)
    options = {"activation": case.activation, "cu_seqlens": bounds, "backend": backend}
    return with_gradients(partial(causal_conv1d, **options), whole_inputs(case), dtype)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard) -> dict[str, Tensor]:
    return {n: shard.split(x, dim=1) if n in ("x", "dout", "out", "dx") else x for n, x in whole.items()}


def over_ranks(
    case: Case,
    dtype: torch.dtype = torch.float64,
    inputs: dict[str, Tensor] | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """This rank's results of the call, with the weights' gradients summed over the group (in float64)."""
    group = group or world_group()
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)
    local = local_parts(whole_inputs(case) if inputs is None else inputs, shard)
    call = partial(sequence_parallel_conv1d, shard=shard, activation=case.activation)
    results = with_gradients(call, local, dtype)
    for name in ("dweight", "dbias")[: 1 + case.bias]:
        results[name] = results[name].double()
        dist.all_reduce(results[name], group=group)
    return results


def _check_cases(rank: int, world: int, cases: tuple[Case, ...], truths: list[dict[str, Tensor]]) -> None:
    for case, truth in zip(cases, truths, strict=True):
        local = local_parts(truth, SequenceShard(case.tokens, world_group(), case.layout, case.documents))
        results = over_ranks(case)
        assert results.keys() == truth.keys()
        for name, result in results.items():
            error = relative_error(result, local[name], truth[name])
            assert error <= 1e-12, f"{name} is off by {error:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_one_device(world: int) -> None:
    run_distributed(world, _check_cases, CASES, [on_one_device(case) for case in CASES])


def _check_groups(rank: int, world: int) -> None:
    # Every process makes every group, in the same order; then two of them work at the same time.
    groups = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2])]
    group = groups[0 if rank in (1, 3) else 1]
    assert isinstance(group, dist.ProcessGroup)
    for case in CASES[1], CASES[6]:
        results, truth = over_ranks(case, group=group), on_one_device(case)
        shard = SequenceShard(case.tokens, group, case.layout, case.documents)
        for name, whole in local_parts(truth, shard).items():
            torch.testing.assert_close(results[name], whole, rtol=1e-12, atol=1e-12)


def test_any_subset_of_the_ranks_is_a_group() -> None:
    run_distributed(4, _check_groups)


def _check_rounding(rank: int, world: int, case: Case, dtype: torch.dtype) -> list[dict[str, float]]:
    """Squared errors of this rank's tokens over ranks and on one device, where a rank's cut is never far away."""
    inputs = {name: x.to(dtype).double() for name, x in whole_inputs(case).items()}  # what the dtype can hold
    shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
    local = partial(sequence_parallel_conv1d, shard=SequenceShard(case.tokens), activation="silu")
    truth, single = (local_parts(with_gradients(local, inputs, kind), shard) for kind in (torch.float64, dtype))
    spread = over_ranks(case, dtype, inputs)
    return [squared_errors(results, {name: truth[name] for name in ("out", "dx")}) for results in (spread, single)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_every_dtype_loses_nothing_over_ranks(layout: str, dtype: torch.dtype) -> None:
    # Half of the tokens stand in somebody's halo: sums that were rounded twice would show. In float32 only the order of
    # a token's few products differs.
    case = Case(tokens=24 if layout == "contiguous" else 48, layout=layout)
    errors = run_distributed(4, _check_rounding, case, dtype)
    allowed = 4 if dtype == torch.float32 else 1.02  # 1.09 with one more rounding of what is sent or of what stays
    for name in errors[0][0]:
        spread, single = (sum(of_rank[which][name] for of_rank in errors) ** 0.5 for which in (0, 1))
        assert 0 < spread <= allowed * single, (name, spread, single)


def _exchanges(counter: MessageCounter) -> list[tuple[int, int]]:
    return [(m.sent_bytes, m.received_bytes) for m in counter.messages if m.kind == "exchange"]


def _check_messages(rank: int, world: int) -> None:
    token = CHANNELS * 2  # bytes, in bfloat16; gradients travel in float32
    for layout, links in (("contiguous", 1), ("zigzag", 2)):
        for tokens in (24, 2400):
            # The last zigzag rank holds its two chunks side by side: one run, whose halo is its neighbour's.
            before = links - (layout == "zigzag" and rank == world - 1) - (rank == 0)
            after = links - (layout == "zigzag" and rank == world - 1) - (rank == (world - 1 if links == 1 else 0))
            shard = SequenceShard(tokens, world_group(), layout)
            x = torch.randn(1, shard.local_length, CHANNELS).bfloat16().requires_grad_()
            weight = torch.randn(CHANNELS, 4).bfloat16().requires_grad_()
            with count_messages() as counter:
                y = sequence_parallel_conv1d(x, weight, None, shard)
            assert counter.count("all_gather") == 1  # the handshake
            assert _exchanges(counter) == [(3 * token * after, 3 * token * before)]
            with count_messages() as counter:
                y.sum().backward()
            assert _exchanges(counter) == [(6 * token * before, 6 * token * after)] and counter.count() == 1
    # Only as many tokens as the document has before the cut; nothing where it ends there.
    shard = SequenceShard(24, world_group(), cu_seqlens=[0, 7, 16, 24])
    x = torch.randn(1, 8, CHANNELS, requires_grad=True)
    with count_messages() as counter:
        y = sequence_parallel_conv1d(x, torch.randn(CHANNELS, 4), None, shard)
    assert _exchanges(counter) == ([(2 * token, 0)], [(0, 2 * token)], [])[rank]
    with count_messages() as counter:
        y.sum().backward()
    assert _exchanges(counter) == ([(0, 2 * token)], [(2 * token, 0)], [])[rank]


def test_only_the_halo_travels_and_only_to_neighbours() -> None:
    run_distributed(3, _check_messages)


def _check_containment(rank: int, world: int) -> None:
    case = Case(layout="zigzag", documents=(0, 10, 25, 37))
    clean, inputs = over_ranks(case), whole_inputs(case)
    inputs["x"][:, 22, 2] = torch.nan
    inputs["dout"][:, 12, 1] = torch.nan
    dirty = over_ranks(case, inputs=inputs)
    positions = SequenceShard(case.tokens, world_group(), case.layout, case.documents).positions
    readers = (positions >= 22) & (positions < 25)
    assert dirty["out"][:, readers, 2].isnan().all()
    assert torch.equal(dirty["out"][:, ~readers], clean["out"][:, ~readers])
    seen = (positions >= 19) & (positions < 25)  # what the readers see gets their gradients
    told = (positions >= 10) & (positions <= 12)  # as far as the document goes back
    assert dirty["dx"][:, seen, 2].isnan().all() and dirty["dx"][:, told, 1].isnan().all()
    assert torch.equal(dirty["dx"][:, ~seen, 2], clean["dx"][:, ~seen, 2])
    assert torch.equal(dirty["dx"][:, ~told, 1], clean["dx"][:, ~told, 1])
    for name in ("dx", "out"):
        others = [0, 3, 4]
        assert torch.equal(dirty[name][:, :, others], clean[name][:, :, others])


def test_nan_stays_in_its_document_and_channel_and_behind_its_token() -> None:
    run_distributed(3, _check_containment)


def _layer(x: Tensor, weight: Tensor, shard: SequenceShard) -> Tensor:
    return x + sequence_parallel_conv1d(2 * x, weight, None, shard, activation="silu").sigmoid()


def _run(policy: str, shard: SequenceShard) -> tuple[list[Tensor], list[tuple[int, int]], list[tuple[int, int]]]:
    """Results and gradients of a layer, and the exchanges of forward and of backward."""
    x = shard.split(random((1, shard.length, CHANNELS), 5), dim=1).requires_grad_()
    weight = random((CHANNELS, 4), 6).requires_grad_()
    layer = partial(_layer, shard=shard)
    contexts: dict[str, Any] = (
        {"context_fn": partial(create_selective_checkpoint_contexts, KEPT)} if policy == "keep" else {}
    )
    with count_messages() as forward:
        y = layer(x, weight) if policy == "none" else checkpoint(layer, x, weight, use_reentrant=False, **contexts)
    assert isinstance(y, Tensor)
    with count_messages() as backward:
        y.square().sum().backward()
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad], _exchanges(forward), _exchanges(backward)


def _check_policies(rank: int, world: int) -> None:
    shard = SequenceShard(29, world_group(), "zigzag", [0, 10, 29])
    expected, forward, plain = _run("none", shard)
    kept, _, keeping = _run("keep", shard)
    full, _, recomputing = _run("full", shard)
    for results in (kept, full):
        assert all(torch.equal(result, truth) for result, truth in zip(results, expected, strict=True))
    assert len(forward) == len(plain) == 1
    # The halo is held: forward's message is repeated only where forward is.
    assert keeping == plain and recomputing == forward + plain


def test_kept_convolutions_are_not_computed_again() -> None:
    run_distributed(3, _check_policies)


def _check_compiled(rank: int, world: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, backend=counter, fullgraph=True)
    compilations = []
    for bounds in ([0, 24], [0, 10, 24], [0, 3, 3, 24], [0, 12, 24]):
        shard = SequenceShard(24, world_group(), "zigzag", bounds)  # other documents in every batch
        x, weight = shard.split(random((1, 24, CHANNELS), 7), dim=1), random((CHANNELS, 4), 8)
        results = []
        for layer in (_layer, compiled):
            leaves = [leaf.clone().requires_grad_() for leaf in (x, weight)]
            y = layer(leaves[0], leaves[1], shard)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        for result, truth in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12)
        compilations.append(counter.frame_count)
    # The second shard may show the compiler that the handle is not constant; no later one compiles anything.
    assert compilations[1] == compilations[2] == compilations[3] <= 2


def test_compiled_layers_are_one_graph_and_new_documents_compile_nothing() -> None:
    run_distributed(2, _check_compiled, timeout=200)


def _check_operators(rank: int, world: int) -> None:
    shard = SequenceShard(4 * world, world_group(), "zigzag", [0, 3, 4 * world])
    options = {"shard": shard.handle, "activation": "silu", "backend": "torch"}
    for keep in (False, True):
        x, weight, bias = (
            random(shape, 9).requires_grad_() for shape in ((1, 4, CHANNELS), (CHANNELS, 3), (CHANNELS,))
        )
        torch.library.opcheck(
            conv1d.forward,
            (x, weight, bias),
            {**options, "gradients": True, "keep": keep},
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_the_operators_keep_what_they_register() -> None:
    run_distributed(2, _check_operators)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    shard, mode = SequenceShard(9), FakeTensorMode()
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = torch.randn(2, 9, CHANNELS, dtype=dtype), torch.randn(CHANNELS, 4)
        with mode:
            fake = [mode.from_tensor(leaf).requires_grad_() for leaf in (x, weight)]
            y = sequence_parallel_conv1d(fake[0], fake[1], None, shard)
            y.sum().backward()
        assert (y.shape, y.dtype) == (x.shape, dtype) and all(leaf.grad is not None for leaf in fake)


def _disagree(rank: int, world: int) -> list[str]:
    shard = SequenceShard(8, world_group())
    x, weight, bias = torch.randn(1, 4, CHANNELS), torch.randn(CHANNELS, 4), torch.randn(CHANNELS)
    calls: list[Callable[[], object]] = [
        lambda: sequence_parallel_conv1d(x, weight[:, rank:], None, shard),
        lambda: sequence_parallel_conv1d(x, weight, bias if rank else None, shard),
        lambda: sequence_parallel_conv1d(x, weight, None, shard, activation="silu" if rank else None),
        lambda: sequence_parallel_conv1d(x.clone().requires_grad_(rank == 1), weight, None, shard),
    ]
    messages = []
    for call in calls:
        with pytest.raises(ValueError) as told:
            call()
        messages.append(str(told.value))
    return messages


def test_ranks_that_disagree_are_all_told() -> None:
    messages = run_distributed(2, _disagree, timeout=20)
    assert messages[0] == messages[1]
    assert "weight: rank 0 got [5, 4] torch.float32; rank 1 got [5, 3] torch.float32" in messages[0][0]
    assert "bias: rank 0 got None; rank 1 got [5] torch.float32" in messages[0][1]
    assert "activation: rank 0 got None; rank 1 got silu" in messages[0][2]
    assert "requires_grad: rank 0 got False; rank 1 got True" in messages[0][3]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shard": SequenceShard(9, layout="striped")}, r"shard: got layout 'striped'.*relayout"),
        ({"shard": SequenceShard(10)}, "x: got 9 tokens .* shard.local_length = 10"),
        ({"shard": SequenceShard.pretend(27, rank=1, world=3)}, "shard: .* group=group"),
        ({"shard": "contiguous"}, "shard: got str"),
        ({"x": torch.zeros(9, CHANNELS)}, "x: got shape"),
        ({"x": torch.zeros(2, 9, CHANNELS), "shard": SequenceShard(9, cu_seqlens=[0, 4, 9])}, "2 packed documents"),
        ({"weight": torch.zeros(4, CHANNELS)}, "weight: got shape"),
        ({"bias": torch.zeros(4)}, "bias: got shape"),
        ({"activation": "gelu"}, "activation: got 'gelu', expected None or 'silu'"),
        ({"backend": "reference"}, "backend: got 'reference'"),
        ({"backend": "chunked"}, "backend: got 'chunked'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], named: str) -> None:
    given = {"x": torch.zeros(1, 9, CHANNELS), "weight": torch.zeros(CHANNELS, 4), "bias": None}
    arguments = {**given, "shard": SequenceShard(9), **changes}
    with pytest.raises(ValueError, match=named):
        sequence_parallel_conv1d(**arguments)  # pyright: ignore[reportArgumentType] that is the test


def test_results_repeat_and_autocast_changes_nothing() -> None:
    case = replace(CASES[6], layout="contiguous")
    shard = SequenceShard(case.tokens, cu_seqlens=case.documents)
    inputs = whole_inputs(case)
    call = partial(sequence_parallel_conv1d, shard=shard, activation="silu")
    plain = with_gradients(call, inputs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        again = with_gradients(call, inputs, torch.float32)
    assert all(torch.equal(plain[name], again[name]) for name in plain)
