"""Ring attention over ranks against a dense float64 softmax on whole tensors, gradients of out and lse included."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from tests.distributed import run_distributed
from tests.parallel.attention_cases import (
    CASES,
    CROSS,
    NAMES,
    PACKED,
    Attend,
    Case,
    local_parts,
    over_ranks,
    relative_errors,
    shards,
    truths,
    whole_inputs,
    with_gradients,
)
from tests.parallel.comparing import squared_errors, world_group


def _check_cases(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    for case, truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, world_group()), truth, world_group())
        assert set(errors) >= set(NAMES[:5])
        for name, error in errors.items():
            assert error <= 1e-10, f"{name} is off by {error:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_dense_softmax(world: int) -> None:
    run_distributed(world, _check_cases, CASES, truths(CASES))


def _check_float32(
    rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]], dense_of: list[dict[str, Tensor]]
) -> None:
    for case, truth, one_device in zip(cases, truth_of, dense_of, strict=True):
        shard, key_shard = shards(case, world_group())
        lost = relative_errors(case, local_parts(one_device, shard, key_shard), truth, world_group())
        errors = relative_errors(case, over_ranks(case, torch.float32, world_group()), truth, world_group())
        for name, error in errors.items():
            budget = max(4 * lost[name], 5e-6)
            assert error <= budget, f"{name}: {error:.1e} > {budget:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [2, 3])
def test_float32_loses_what_one_device_loses(world: int) -> None:
    # One key dominates each shard, by another margin on each: the blocks' lse lie up to a thousand apart.
    cases = CASES[:8] + tuple(replace(case, dominant_keys=True) for case in CASES[:8])
    run_distributed(world, _check_float32, cases, truths(cases), truths(cases, torch.float32))


def _check_groups(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    # Every process makes every group, in the same order; then the groups work at the same time.
    groups = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2], [3, 0, 1])]
    group, three = groups[0 if rank in (1, 3) else 1], groups[2]
    assert isinstance(group, dist.ProcessGroup)
    for case, truth in zip(cases, truth_of, strict=True):
        for name, error in relative_errors(case, over_ranks(case, torch.float64, group), truth, group).items():
            assert error <= 1e-10, (name, error)
        if isinstance(three, dist.ProcessGroup):  # not on rank 2
            errors = relative_errors(case, over_ranks(case, torch.float64, three), truth, three)
            assert max(errors.values()) <= 1e-10, errors


def test_any_subset_of_the_ranks_is_a_group() -> None:
    cases = (PACKED, CROSS)
    run_distributed(4, _check_groups, cases, truths(cases))


def _check_repeats(rank: int, world: int) -> None:
    for case in CASES[:6]:
        once, again = (over_ranks(case, torch.float32, world_group()) for _ in range(2))
        for name in once:
            assert torch.equal(once[name], again[name]), (name, case)


def test_two_runs_are_bitwise_equal() -> None:
    run_distributed(3, _check_repeats)


def _check_blind_queries(rank: int, world: int) -> None:
    # 10 more queries than keys, aligned at the end: the first 10 of them stand before the first key.
    window = Case(layout="striped", keys=27, causal=False, window=(0, 0), sinks=True)
    for case in (Case(layout="zigzag", keys=27), window):
        shard, _ = shards(case, world_group())
        results = over_ranks(case, torch.float32, world_group())
        blind = shard.positions < 10
        assert (results["out"][:, blind] == 0).all() and (results["dq"][:, blind] == 0).all()
        assert (results["lse"][:, blind] == -torch.inf).all()
        assert results["lse"][:, ~blind].isfinite().all()
        assert results["dk"].isfinite().all() and results["dv"].isfinite().all()


def test_queries_that_see_nothing_get_nothing() -> None:
    run_distributed(3, _check_blind_queries)


def _check_bfloat16(rank: int, world: int) -> list[dict[str, float]]:
    """Squared errors of this rank's tokens in bfloat16: over ranks, and on one device."""
    case = Case(tokens=256, layout="zigzag", heads=4, groups=2, key_width=16, value_width=16)
    inputs = whole_inputs(case)
    inputs |= {name: inputs[name].bfloat16().double() for name in ("q", "k", "v")}  # what bfloat16 can hold
    shard, alone = SequenceShard(case.tokens, world_group(), case.layout), SequenceShard(case.tokens)

    def on(shard: SequenceShard) -> Attend:
        return lambda q, k, v, _: sequence_parallel_attention(q, k, v, shard, strategy="ring")

    truth = local_parts(with_gradients(on(alone), inputs, torch.float64, sinks=False), shard, None)
    single = local_parts(with_gradients(on(alone), inputs, torch.bfloat16, sinks=False), shard, None)
    spread = with_gradients(on(shard), local_parts(inputs, shard, None), torch.bfloat16, sinks=False)
    return [squared_errors(spread, truth), squared_errors(single, truth)]


def test_bfloat16_loses_nothing_to_the_ring() -> None:
    errors = run_distributed(8, _check_bfloat16)
    for name in errors[0][0]:
        spread, single = (sum(of_rank[which][name] for of_rank in errors) ** 0.5 for which in (0, 1))
        # lse is float32, and every merge rounds it: the budget of float32.
        assert 0 < spread <= (4 if name == "lse" else 1.1) * single, (name, spread, single)


def _check_containment(rank: int, world: int, backend: str) -> None:
    # Documents of tokens 0-9, 10-24, 25-36; NaN and inf in the middle one, in another head of k than of v.
    case = Case(layout="striped", documents=(0, 10, 25, 37), heads=4, groups=2, backend=backend)
    clean = over_ranks(case, torch.float32, world_group())
    shard, _ = shards(case, world_group())
    inputs = whole_inputs(case)
    inputs["k"][:, 12, 0] = torch.nan
    inputs["v"][:, 17, 0] = torch.inf
    inputs["dout"][:, 20, 1] = torch.nan  # head 1 reads group 0
    dirty = with_gradients(
        lambda q, k, v, _: sequence_parallel_attention(q, k, v, shard, backend=backend),
        local_parts(inputs, shard, None),
        torch.float32,
        sinks=False,
    )
    elsewhere = (shard.positions < 10) | (shard.positions >= 25)
    for name in NAMES[:5]:
        half = clean[name].shape[2] // 2  # the heads of group 1
        assert torch.equal(dirty[name][:, elsewhere], clean[name][:, elsewhere]), name
        assert torch.equal(dirty[name][:, :, half:], clean[name][:, :, half:]), name
    assert dirty["out"][:, shard.positions == 24, :2].isnan().all()  # and who sees it is told


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_nan_stays_in_its_document_and_head(backend: str) -> None:
    run_distributed(3, _check_containment, backend)
