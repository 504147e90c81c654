"""The scan over ranks against a token-by-token float64 recurrence on whole tensors: states and gradients in and out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.parallel import SequenceShard
from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)
from tests.distributed import run_distributed
from tests.parallel.comparing import squared_errors, world_group
from tests.parallel.linear_cases import (
    BATCHED,
    CASES,
    PACKED,
    STRATEGIES,
    Case,
    local_parts,
    over_ranks,
    recurrence,
    relative_errors,
    run,
    truths,
    whole_inputs,
    with_gradients,
)

Truth = dict[str, Tensor]


def _check_cases(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[Truth]) -> None:
    for case, truth in zip(cases, truth_of, strict=True):
        _check(case, truth)


def _check(case: Case, truth: Truth, alone: Truth | None = None) -> None:
    """Compare with float64 truth; in float32 (alone: what it comes to on one device) with what one device loses."""
    group, dtype = world_group(), torch.float64 if alone is None else torch.float32
    errors = relative_errors(case, over_ranks(case, dtype, group), truth, group)
    lost = dict.fromkeys(errors, 0.0)
    if alone is not None:
        shard = SequenceShard(case.tokens, group, case.layout, case.documents)
        lost = relative_errors(case, local_parts(alone, shard), truth, group)
    assert set(errors) == set(truth)
    for name, error in errors.items():
        budget = 1e-10 if alone is None else max(4 * lost[name], 5e-6)
        where = f"on rank {dist.get_rank(group)} of {dist.get_world_size(group)} in {case}"
        assert error <= budget, f"{name}: {error:.1e} > {budget:.1e} {where}"


def _possible(strategy: str, case: Case, world: int) -> bool:
    return strategy != "ulysses" or case.heads % world == 0


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_recurrence(world: int) -> None:
    cases = []
    for number, case in enumerate(CASES):
        strategy = STRATEGIES[(number + world) % len(STRATEGIES)]
        cases.append(replace(case, strategy=strategy if _possible(strategy, case, world) else "auto"))
    run_distributed(world, _check_cases, tuple(cases), truths(CASES))


DOCUMENTS = {37: [None, (0, 5, 12, 20, 29, 37), (0, 0, 9, 18, 18, 37)], 5: [None, (0, 2, 5)], 2: [None, (0, 1, 2)]}


def _fits(choice: dict[str, Any]) -> bool:
    mixer, decay = choice["mixer"], choice["decay"]
    return (
        choice["documents"] in DOCUMENTS[choice["tokens"]]
        and not (choice["documents"] and choice["batch"] > 1)
        and not (mixer == "slot" and decay != "token")
        and not (mixer == "delta" and decay == "head")
        and (choice["strategy"] != "ulysses" or choice["heads"] % choice["world"] == 0)
        and choice["heads"] % choice["groups"] == 0
    )


@cover(
    {
        "world": [1, 2, 3, 4],
        "strategy": STRATEGIES,
        "mixer": ["linear", "delta", "slot"],
        "layout": ["contiguous", "zigzag"],
        "documents": list({documents: None for of_length in DOCUMENTS.values() for documents in of_length}),
        "tokens": [37, 5, 2],
        "decay": ["token", "channel", "head", None],
        "ends": ["", "initial", "state", "initial and state"],
        "heads": [4, 3, 6],
        "groups": [1, 2, 3],
        "batch": [1, 2],
        "dtype": [torch.float64, torch.float32],
        "strength": [0.02, 1.0],
    },
    _fits,
)
def test_every_strategy_is_the_recurrence(case: dict[str, Any]) -> None:
    choice = dict(case)
    world, dtype, ends = choice.pop("world"), choice.pop("dtype"), choice.pop("ends")
    wanted = Case(**choice, initial="initial" in ends, state="state" in ends)
    truth, alone = recurrence(wanted, torch.float64), None
    if dtype == torch.float32:
        alone = recurrence(wanted, dtype)
    run_distributed(world, _check_one, wanted, truth, alone)


def _check_one(rank: int, world: int, case: Case, truth: Truth, alone: Truth | None) -> None:
    _check(case, truth, alone)


def _check_float32(
    rank: int, world: int, cases: tuple[Case, ...], truth_of: list[Truth], alone_of: list[Truth]
) -> None:
    for case, truth, alone in zip(cases, truth_of, alone_of, strict=True):
        _check(case, truth, alone)


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
    cases = (BATCHED, PACKED, *(replace(PACKED, strategy=strategy) for strategy in STRATEGIES))
    cases += tuple(replace(PACKED, mixer="slot", strategy=strategy) for strategy in ("alltoall", "chain"))
    run_distributed(4, _check_groups, cases, truths(cases))


def _check_repeats(rank: int, world: int) -> None:
    for case in CASES[2:11]:
        once, again = (over_ranks(case, torch.float32, world_group()) for _ in range(2))
        for name in once:
            assert torch.equal(once[name], again[name]), (name, case)


def test_two_runs_are_bitwise_equal() -> None:
    run_distributed(3, _check_repeats)


def _check_bfloat16(rank: int, world: int) -> list[dict[str, float]]:
    """Squared errors of this rank's tokens in bfloat16: over ranks, and on one device."""
    case = Case(tokens=160, layout="zigzag", decay="channel", state=True, key_width=8, value_width=8)
    inputs = whole_inputs(case)
    inputs |= {name: inputs[name].bfloat16().double() for name in ("q", "k", "v", "decay")}  # what bfloat16 can hold
    shard, alone = SequenceShard(case.tokens, world_group(), case.layout), SequenceShard(case.tokens)
    weight = float(rank == 0)  # the state's gradient counts once, not once a rank

    truth = local_parts(with_gradients(case, lambda x: run(x, alone), inputs, torch.float64), shard)
    single = local_parts(with_gradients(case, lambda x: run(x, alone), inputs, torch.bfloat16), shard)
    local = local_parts(inputs, shard)
    spread = with_gradients(case, lambda x: run(x, shard), local, torch.bfloat16, state_weight=weight)
    return [squared_errors(spread, truth), squared_errors(single, truth)]


def test_bfloat16_loses_nothing_to_the_scan() -> None:
    errors = run_distributed(4, _check_bfloat16)
    for name in errors[0][0]:
        spread, single = (sum(of_rank[which][name] for of_rank in errors) ** 0.5 for which in (0, 1))
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
        lambda x: run(x, shard, x["initial_S"]),
        local_parts(inputs, shard),
        torch.float32,
        state_weight=weight,
    )
    elsewhere = (shard.positions < 10) | (shard.positions >= 25)
    for name in ("out", "dq", "dk", "dv", "ddecay"):
        assert torch.equal(dirty[name][:, elsewhere], clean[name][:, elsewhere]), name
        assert torch.equal(dirty[name][:, :, 1], clean[name][:, :, 1]), name
    assert torch.equal(dirty["state_S"], clean["state_S"]) and dirty["dinitial_S"].isfinite().all()
    assert dirty["out"][:, shard.positions == 24, 0].isnan().all()  # and who sees it is told


def test_nan_stays_in_its_document_and_head() -> None:
    run_distributed(3, _check_containment)
