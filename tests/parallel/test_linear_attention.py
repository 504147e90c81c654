"""The scan over ranks against a token-by-token float64 recurrence on whole tensors: states and gradients in and out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.kernels.linear_attention import linear_attention
from longtrain.parallel import SequenceShard
from longtrain.parallel.communication import count_messages
from longtrain.parallel.linear_attention import sequence_parallel_linear_attention
from longtrain.parallel.scan import scan_plan
from tests.distributed import run_distributed

SHARDED = ("q", "k", "v", "out", "dq", "dk", "dv", "dout")  # and decays with a token dimension


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors."""

    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    decay: str | None = "token"  # None, "head" [H], "token" [B, T, H] or "channel" [B, T, H, K]
    strength: float = 0.02  # of the log-decay: slow, so that states live through whole ranks
    initial: bool = False
    state: bool = False
    scale: float | None = None
    batch: int = 1
    heads: int = 2
    groups: int = 2
    key_width: int = 5
    value_width: int = 4


BATCHED = Case(layout="zigzag", decay="channel", batch=2, initial=True, state=True)
PACKED = Case(layout="zigzag", documents=(0, 5, 12, 20, 29, 37), decay="channel", initial=True, state=True)
CASES = (
    Case(layout="contiguous", decay=None),
    Case(layout="zigzag", decay=None, initial=True, state=True, scale=0.6),
    Case(layout="contiguous", decay="head", initial=True, state=True, heads=4, groups=2),
    Case(layout="zigzag", decay="head", batch=2, heads=4, groups=1),
    Case(layout="contiguous", decay="token", batch=2, initial=True, state=True),
    Case(layout="zigzag", decay="token", state=True, value_width=7),
    Case(layout="contiguous", decay="channel", initial=True),
    Case(layout="contiguous", decay="channel", state=True, heads=4, groups=2),
    BATCHED,
    # Documents that end inside every rank, on the cuts between ranks, that span several ranks; empty ones.
    Case(layout="contiguous", documents=(0, 5, 12, 20, 29, 37), initial=True, state=True),
    PACKED,
    Case(layout="contiguous", documents=(0, 0, 9, 18, 18, 37), decay="head", initial=True, state=True),
    Case(layout="zigzag", documents=(0, 18, 19, 36, 37), decay="token", heads=4, groups=2, state=True),
    Case(layout="zigzag", documents=(0, 1, 35, 37, 37), decay=None, initial=True, state=True),
    Case(layout="contiguous", documents=(0, 30, 37), decay="channel", strength=5.0, initial=True, state=True),
    Case(layout="zigzag", tokens=3, decay="token", initial=True, state=True),
    Case(layout="contiguous", tokens=2, documents=(0, 1, 2), decay="channel", initial=True, state=True),
    Case(layout="zigzag", tokens=1, decay="head", initial=True, state=True),
    Case(layout="contiguous", tokens=151, decay="channel", state=True),  # several chunks on a rank
)


def world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return group


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: the call's arguments, and the gradients of its results."""
    seeded = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded, dtype=torch.float64)

    rows, state = (case.batch, case.tokens), (case.batch, case.heads, case.key_width, case.value_width)
    shapes = {"head": (case.heads,), "token": (*rows, case.heads), "channel": (*rows, case.heads, case.key_width)}
    inputs = {
        "q": normal(*rows, case.groups, case.key_width),
        "k": normal(*rows, case.groups, case.key_width),
        "v": normal(*rows, case.heads, case.value_width),
        "initial": normal(*state),
        "dout": normal(*rows, case.heads, case.value_width),
        "dstate": normal(*state),
    }
    if case.decay is not None:
        inputs["decay"] = -case.strength * normal(*shapes[case.decay]).abs()
    return inputs


Attend = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]]


def with_gradients(
    case: Case, attend: Attend, inputs: dict[str, Tensor], dtype: torch.dtype, *, state_weight: float = 1.0
) -> dict[str, Tensor]:
    """out, state and all gradients of one call on `inputs`; the loss weighs out and state at random."""
    names = ["q", "k", "v"] + ["decay"] * (case.decay is not None) + ["initial"] * case.initial
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in names}
    out, state = attend(leaves)
    wide = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype
    loss = (out.to(wide) * inputs["dout"].to(wide)).sum()
    results = {"out": out.detach()}
    assert (state is not None) == case.state
    if state is not None:
        assert state.dtype == wide and state.shape == inputs["dstate"].shape
        loss = loss + state_weight * (state * inputs["dstate"].to(wide)).sum()
        results["state"] = state.detach()
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype, name
        results["d" + name] = leaf.grad
    return results


def recurrence(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole call on one device, token by token."""
    bounds = None if case.documents is None else torch.tensor(case.documents)
    documents = 1 if case.documents is None else len(case.documents) - 1
    filled = [n for n in range(documents) if case.documents is None or case.documents[n] < case.documents[n + 1]]

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        initial = leaves.get("initial")
        if initial is not None and bounds is not None:
            # It enters the document of the first token; all others start from zeros.
            zeros = torch.zeros_like(initial)
            initial = torch.cat([initial if n == filled[0] else zeros for n in range(documents)])
        out, state = linear_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            leaves.get("decay"),
            scale=case.scale,
            initial_state=initial,
            return_state=case.state,
            cu_seqlens=bounds,
            backend="reference",
        )
        if state is not None and bounds is not None:
            state = state[filled[-1]].unsqueeze(0)
        return out, state

    return with_gradients(case, attend, whole_inputs(case), dtype)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard) -> dict[str, Tensor]:
    """This rank's tokens of whole tensors; what is replicated stays whole."""

    def is_sharded(name: str, x: Tensor) -> bool:
        return name in SHARDED or (name in ("decay", "ddecay") and x.ndim > 1)

    return {name: shard.split(x, dim=1) if is_sharded(name, x) else x for name, x in whole.items()}


def over_ranks(case: Case, dtype: torch.dtype, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's results of the call over the group, with replicated inputs' gradients summed over the group."""
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return sequence_parallel_linear_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            leaves.get("decay"),
            shard,
            scale=case.scale,
            initial_state=leaves.get("initial"),
            return_state=case.state,
        )

    # Every rank uses its copy of the state, each with another weight; the weights sum to 1.
    weight = 2 * (shard.rank + 1) / (shard.world * (shard.world + 1))
    results = with_gradients(case, attend, local_parts(whole_inputs(case), shard), dtype, state_weight=weight)
    for name in ("dinitial", "ddecay"):
        if name in results and group is not None and (name == "dinitial" or case.decay == "head"):
            dist.all_reduce(results[name], group=group)
    return results


def run(x: dict[str, Tensor], shard: SequenceShard, initial: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The call as most tests make it: with a decay, and with the state after the last token."""
    return sequence_parallel_linear_attention(
        x["q"], x["k"], x["v"], x["decay"], shard, initial_state=initial, return_state=True
    )


def relative_errors(
    case: Case, results: dict[str, Tensor], truth: dict[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """The error of each of this rank's tensors in units of the true tensor."""
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)
    local_truth, errors = local_parts(truth, shard), {}
    for name, result in results.items():
        local = local_truth[name]
        assert result.shape == local.shape, (name, result.shape, local.shape)
        # A rank may hold a few nearly-zero rows: they are measured by a small part of the whole tensor's size.
        size = max(local.norm(), 1e-3 * truth[name].norm())
        difference = (result.double() - local).norm()
        errors[name] = float(difference / size) if size else float(difference)
    return errors


@cache
def truths(cases: tuple[Case, ...], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """What every case comes to, computed once in the test's own process for all ranks and worlds."""
    return [recurrence(case, dtype) for case in cases]


def _check_cases(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    for case, truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, world_group()), truth, world_group())
        assert set(errors) == set(truth)
        for name, error in errors.items():
            assert error <= 1e-10, f"{name} is off by {error:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_recurrence(world: int) -> None:
    run_distributed(world, _check_cases, CASES, truths(CASES))


def _check_float32(
    rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]], alone_of: list[dict[str, Tensor]]
) -> None:
    for case, truth, alone in zip(cases, truth_of, alone_of, strict=True):
        shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
        lost = relative_errors(case, local_parts(alone, shard), truth, world_group())
        errors = relative_errors(case, over_ranks(case, torch.float32, world_group()), truth, world_group())
        for name, error in errors.items():
            budget = max(4 * lost[name], 5e-6)
            assert error <= budget, f"{name}: {error:.1e} > {budget:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [2, 3])
def test_float32_loses_what_one_device_loses(world: int) -> None:
    # Beside the slow decays some that forget within a few tokens.
    cases = CASES + tuple(replace(case, strength=1.0) for case in CASES[4:11])
    run_distributed(world, _check_float32, cases, truths(cases), truths(cases, torch.float32))


def _check_groups(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    # Every process makes every group, in the same order; then two of them work at the same time.
    groups = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2])]
    group = groups[0 if rank in (1, 3) else 1]
    assert isinstance(group, dist.ProcessGroup)
    for case, truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, group), truth, group)
        assert max(errors.values()) <= 1e-10, errors


def test_any_subset_of_the_ranks_is_a_group() -> None:
    cases = (BATCHED, PACKED)
    run_distributed(4, _check_groups, cases, truths(cases))


def _check_repeats(rank: int, world: int) -> None:
    for case in CASES[2:11]:
        once, again = (over_ranks(case, torch.float32, world_group()) for _ in range(2))
        for name in once:
            assert torch.equal(once[name], again[name]), (name, case)


def test_two_runs_are_bitwise_equal() -> None:
    run_distributed(3, _check_repeats)


def _check_bfloat16(rank: int, world: int) -> dict[str, tuple[float, float]]:
    """Squared errors of this rank's tokens in bfloat16: over ranks, and on one device."""
    case = Case(tokens=160, layout="zigzag", decay="channel", state=True, heads=2, key_width=8, value_width=8)
    inputs = whole_inputs(case)
    # What bfloat16 can hold, so that the inputs' own rounding does not count.
    inputs |= {name: inputs[name].bfloat16().double() for name in ("q", "k", "v", "decay")}
    shard, alone = SequenceShard(case.tokens, world_group(), case.layout), SequenceShard(case.tokens)

    def on(shard: SequenceShard) -> Attend:
        return lambda x: run(x, shard)

    # The state's gradient counts once, not once a rank.
    weight = float(rank == 0)
    truth = local_parts(with_gradients(case, on(alone), inputs, torch.float64), shard)
    single = local_parts(with_gradients(case, on(alone), inputs, torch.bfloat16), shard)
    spread = with_gradients(case, on(shard), local_parts(inputs, shard), torch.bfloat16, state_weight=weight)
    return {
        name: (
            float((spread[name].double() - truth[name]).square().sum()),
            float((single[name].double() - truth[name]).square().sum()),
        )
        for name in truth
    }


def test_bfloat16_loses_nothing_to_the_scan() -> None:
    errors = run_distributed(4, _check_bfloat16)
    for name in errors[0]:
        spread, single = (sum(error[name][which] for error in errors) ** 0.5 for which in (0, 1))
        assert 0 < spread <= 1.1 * single, (name, spread, single)


def _check_containment(rank: int, world: int) -> None:
    # Documents of tokens 0-9, 10-24, 25-36; NaN in the middle one, in head 0 only.
    case = replace(PACKED, documents=(0, 10, 25, 37))
    shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
    clean = over_ranks(case, torch.float32, world_group())
    inputs = whole_inputs(case)
    inputs["k"][:, 12, 0] = torch.nan
    inputs["decay"][:, 17, 0] = torch.nan
    inputs["dout"][:, 20, 0] = torch.nan
    weight = 2 * (rank + 1) / (world * (world + 1))
    dirty = with_gradients(
        case,
        lambda x: run(x, shard, x["initial"]),
        local_parts(inputs, shard),
        torch.float32,
        state_weight=weight,
    )
    elsewhere = (shard.positions < 10) | (shard.positions >= 25)
    for name in ("out", "dq", "dk", "dv", "ddecay"):
        assert torch.equal(dirty[name][:, elsewhere], clean[name][:, elsewhere]), name
        assert torch.equal(dirty[name][:, :, 1], clean[name][:, :, 1]), name
    assert torch.equal(dirty["state"], clean["state"]) and dirty["dinitial"].isfinite().all()
    assert dirty["out"][:, shard.positions == 24, 0].isnan().all()  # and who sees it is told


def test_nan_stays_in_its_document_and_head() -> None:
    run_distributed(3, _check_containment)


def _check_messages(rank: int, world: int) -> None:
    for tokens in (24, 240):
        case = Case(tokens=tokens, layout="zigzag", decay="channel", initial=True, state=True)
        shard = SequenceShard(case.tokens, world_group(), case.layout)
        local = local_parts(whole_inputs(case), shard)
        state, runs = 4 * case.heads * case.key_width * case.value_width, min(world, 2)
        for call in range(2):
            leaves = {name: local[name].bfloat16().requires_grad_() for name in ("q", "k", "v", "decay", "initial")}
            with count_messages() as counter:
                out, final = run(leaves, shard, leaves["initial"])
            # The handshake comes once; then one float32 (transition, state) for each run, however long it is ...
            handshake = int(call == 0 and world > 1)
            assert counter.count() == counter.count("all_gather") == handshake + (world > 1)
            summaries = runs * (state + 4 * case.heads * case.key_width)
            assert counter.sent_bytes == (world - 1) * (summaries + 32 * handshake)
            with count_messages() as counter:
                assert final is not None
                (out.float().square().sum() + final.square().sum()).backward()
            # ... and in backward the gradients of the states and nothing of forward's.
            assert counter.count() == counter.count("all_gather") == (world > 1)
            assert counter.sent_bytes == (world - 1) * (runs + 1) * state

    # Nothing crosses where documents end with the ranks (but the handshake).
    ends = tuple(range(0, 8 * world + 1, 8))
    shard = SequenceShard(8 * world, world_group(), cu_seqlens=ends)
    x = torch.randn(1, 8, 2, 3, requires_grad=True)
    with count_messages() as counter:
        out, _ = sequence_parallel_linear_attention(x, x, x, None, shard)
        out.sum().backward()
    assert counter.count() == (world > 1)


@pytest.mark.parametrize("world", [1, 3])
def test_one_small_message_a_pass(world: int) -> None:
    run_distributed(world, _check_messages)


def _check_pieces(rank: int, world: int) -> None:
    # A prompt fed in two pieces, the state handed on, equals the prompt fed at once.
    case = Case(tokens=60, decay="channel", state=True)
    whole = whole_inputs(case)
    at_once = recurrence(case, torch.float64)
    state, outs = None, []
    for start, stop, layout in ((0, 23, "zigzag"), (23, 60, "contiguous")):
        shard = SequenceShard(stop - start, world_group(), layout)
        x = {name: shard.split(whole[name][:, start:stop], dim=1) for name in ("q", "k", "v", "decay")}
        out, state = run(x, shard, state)
        outs.append(shard.gather(out, dim=1))
    assert state is not None
    torch.testing.assert_close(torch.cat(outs, dim=1), at_once["out"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, at_once["state"], rtol=1e-11, atol=1e-12)


def test_a_long_prompt_in_pieces() -> None:
    run_distributed(3, _check_pieces)


def _check_empty(rank: int, world: int) -> None:
    # A sequence without tokens: the state passes, and its gradient.
    shard = SequenceShard(0, world_group())
    x, state = torch.randn(1, 0, 2, 3, requires_grad=True), torch.randn(1, 2, 3, 3, requires_grad=True)
    out, final = sequence_parallel_linear_attention(x, x, x, None, shard, initial_state=state, return_state=True)
    assert out.shape == x.shape and final is not None and torch.equal(final, state)
    (final.sum() * (rank + 1)).backward()
    assert state.grad is not None and x.grad is not None
    dist.all_reduce(state.grad)
    assert torch.equal(state.grad, torch.full_like(state, world * (world + 1) / 2))


def test_an_empty_sequence_passes_the_state_on() -> None:
    run_distributed(2, _check_empty)


def _check_partial_gradients(rank: int, world: int) -> None:
    case = BATCHED
    shard = SequenceShard(case.tokens, world_group(), case.layout)
    local = local_parts(whole_inputs(case), shard)
    expected = over_ranks(case, torch.float64, world_group())
    weight = 2 * (rank + 1) / (world * (world + 1))
    names = ("q", "k", "v", "decay")
    for wanted in (("q",), ("k", "decay"), ("v",)):
        # Non-contiguous inputs on the way: heads and tokens in each other's place in memory.
        leaves = {name: local[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names}
        for name in wanted:
            leaves[name].requires_grad_()
        out, state = run(leaves, shard, local["initial"])
        assert state is not None
        torch.autograd.backward([out, state], [local["dout"], weight * local["dstate"]])
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, expected["d" + name], rtol=1e-11, atol=1e-12)
            else:
                assert leaf.grad is None
    # Ranks may use different results in their losses: the state alone here, out alone there.
    leaves = {name: local[name].clone().requires_grad_() for name in names}
    out, state = run(leaves, shard)
    assert state is not None
    (state if rank == 0 else out).square().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())


def test_gradients_only_where_wanted_and_any_strides() -> None:
    run_distributed(2, _check_partial_gradients)


def test_autocast_changes_nothing() -> None:
    for case in CASES[:2]:
        expected = over_ranks(case, torch.float32, None)
        with torch.autocast("cpu", torch.bfloat16):
            results = over_ranks(case, torch.float32, None)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, (0, 3, 3, 11, 24, 25, 31)])
def test_the_plan_knows_every_segment(layout: str, documents: tuple[int, ...] | None) -> None:
    for world in (1, 2, 3, 5, 40):
        shards = [
            SequenceShard.pretend(31, rank=rank, world=world, layout=layout, cu_seqlens=documents)
            for rank in range(world)
        ]
        for shard in shards:
            plan = scan_plan(shard)
            assert plan.offsets.tolist() == [0, *([segment.stop for segment in shard.segments] or [0])]
            starts = np.append(0, documents or 31)
            for run, after in zip(plan.runs, [*plan.runs[1:], None], strict=True):
                assert run.continues == (run.start not in starts)
                assert run.passes == (not any(run.start < start < run.stop for start in starts))
                assert run.stop == (31 if after is None else after.start)
            mine = [run for run in plan.runs if run.rank == shard.rank]
            positions = shard.positions.tolist()
            for run, first, last in zip(mine, plan.first, plan.last, strict=True):
                assert positions[shard.segments[first].start] == run.start
                assert positions[shard.segments[last].stop - 1] == run.stop - 1


def _disagree(rank: int, world: int) -> list[str]:
    shard = SequenceShard(8, world_group())
    x, decay, state = torch.randn(1, 4, 2, 3), -torch.ones(2), torch.zeros(1, 2, 3, 3)
    calls: list[Callable[[], object]] = [
        lambda: sequence_parallel_linear_attention(x, x, x, decay if rank else None, shard),
        lambda: sequence_parallel_linear_attention(x, x, x, decay, shard, return_state=rank == 0),
        lambda: sequence_parallel_linear_attention(x, x, x, decay, shard, initial_state=state if rank else None),
        lambda: sequence_parallel_linear_attention(x, x, x[..., : 2 + rank], decay, shard),
        lambda: sequence_parallel_linear_attention(
            x, x, x.requires_grad_(), None, shard, initial_state=state.clone().requires_grad_(rank == 1)
        ),
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
    assert "log_decay: rank 0 got None; rank 1 got [2] float32 on cpu" in messages[0][0]
    assert "return_state: rank 0 got True; rank 1 got False" in messages[0][1]
    assert "initial_state: rank 0 got None; rank 1 got given" in messages[0][2]
    assert "v: rank 0 got [1, T_w, 2, 2] float32 on cpu" in messages[0][3]
    assert "initial_state.requires_grad: rank 0 got False; rank 1 got True" in messages[0][4]


def _given() -> dict[str, object]:
    q, k, v = torch.randn(1, 9, 2, 5), torch.randn(1, 9, 2, 5), torch.randn(1, 9, 4, 3)
    return {"q": q, "k": k, "v": v, "log_decay": -torch.rand(1, 9, 4), "shard": SequenceShard(9)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shard": SequenceShard(9, layout="striped")}, r"shard: got layout 'striped'.*relayout"),
        ({"shard": SequenceShard(9, layout="striped:4")}, r"shard: got layout 'striped:4'.*relayout"),
        ({"shard": SequenceShard(10)}, "q: got 9 tokens .* shard.local_length = 10"),
        ({"shard": SequenceShard.pretend(27, rank=1, world=3)}, "shard: .* group=group"),
        ({"shard": "contiguous"}, "shard: got str"),
        ({"q": torch.randn(9, 2, 5)}, "q: got shape"),
        ({"k": torch.randn(1, 9, 3, 5)}, "k: got 3 heads"),
        ({"log_decay": torch.ones(4)}, "log_decay: got 1 at most"),
        ({"log_decay": -torch.ones(3)}, "log_decay: got shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state: got shape"),
        ({"initial_state": torch.zeros(4, 5, 3)}, "initial_state: got shape"),
        ({"return_state": 1}, "return_state: got 1"),
        ({"scale": float("inf")}, "scale: got inf"),
        ({"strategy": "alltoall"}, "strategy: got 'alltoall', .* what works is 'allgather', also as 'auto'"),
        ({"strategy": "chain"}, "strategy: got 'chain'"),
        ({"strategy": "ulysses"}, "strategy: got 'ulysses'"),
        ({"strategy": "ring"}, "strategy: got 'ring', which does not exist"),
        ({"backend": "reference"}, "backend: got 'reference'"),
        ({"backend": "chunked"}, "backend: got 'chunked'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], named: str) -> None:
    arguments = _given() | changes
    given = [arguments.pop(name) for name in ("q", "k", "v", "log_decay", "shard")]
    with pytest.raises(ValueError, match=named):
        sequence_parallel_linear_attention(*given, **arguments)  # pyright: ignore[reportArgumentType] that is the test


def test_packed_documents_need_one_row() -> None:
    q = torch.randn(2, 9, 4, 8)
    with pytest.raises(ValueError, match="2 packed documents with 2 batch rows"):
        sequence_parallel_linear_attention(q, q, q, None, SequenceShard(9, cu_seqlens=[0, 4, 9]))
