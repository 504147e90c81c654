"""Every strategy, layout, mask and option against a dense float64 softmax: pairwise here, all of them under --full."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.cover import pairwise, product
from tests.distributed import run_distributed
from tests.parallel.attention_cases import NAMES, Case, local_parts, over_ranks, relative_errors, shards, truths
from tests.parallel.comparing import world_group

STRATEGIES = ("ring", "allgather", "ulysses", "mesh", "auto")
AXES: dict[str, Any] = {
    "strategy": STRATEGIES,
    "layout": ("contiguous", "zigzag", "striped", "striped:3", "balanced"),
    "mask": ((True, None), (False, None), (True, (9, None)), (False, (3, 5))),
    "documents": (None, (0, 5, 5, 18, 23, 37), (0, 1, 36, 37)),
    "keys": (None, 53, 19),
    "groups": ("all", "two", "one"),
}
OPTIONS: dict[str, Any] = {
    "scores": ({}, {"sinks": True}, {"softcap": 2.5, "scale": 0.7}, {"sinks": True, "softcap": 3.0}),
    "widths": ((8, 8), (8, 5), (4, 6)),
    "heads_at_once": (None, 1, 3),
}


def _fits(choice: dict[str, Any]) -> bool:
    # Packed documents of other keys are cut by a rule of their own below; a few of them are enough.
    return choice["documents"] is None or choice["keys"] != 53


def _cases(full: bool, heads: int) -> tuple[tuple[str, Case], ...]:
    if full:
        more = itertools.cycle(product(OPTIONS))
        choices = [choice | next(more) for choice in product(AXES, _fits)]
    else:
        choices = pairwise(AXES | OPTIONS, _fits)
    return tuple((choice["strategy"], _case(choice, heads)) for choice in choices)


def _case(choice: dict[str, Any], heads: int) -> Case:
    causal, window = choice["mask"]
    documents, keys = choice["documents"], choice["keys"]
    key_documents = None
    if keys is not None and documents is not None:
        key_documents = tuple(bound * keys // 37 for bound in documents)
    return Case(
        layout=choice["layout"],
        documents=documents,
        keys=keys,
        key_layout="zigzag" if choice["layout"] != "zigzag" else "striped",
        key_documents=key_documents,
        causal=causal,
        window=window,
        heads=heads,
        groups={"all": heads, "two": heads // 2 if heads % 2 == 0 else heads // 3, "one": 1}[choice["groups"]],
        key_width=choice["widths"][0],
        value_width=choice["widths"][1],
        heads_at_once=choice["heads_at_once"],
        batch=2 if documents is None and keys is None else 1,
        **choice["scores"],
    )


def _check(
    rank: int, world: int, rows: int, cases: tuple[tuple[str, Case], ...], truth_of: list[dict[str, Tensor]]
) -> None:
    group: Any = world_group()
    if rows > 1:
        group = init_device_mesh("cpu", (rows, world // rows), mesh_dim_names=("outer", "inner"))
    for (strategy, case), truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, group, strategy), truth, group)
        assert set(errors) >= set(NAMES[:5])
        for name, error in errors.items():
            assert error <= 1e-10, f"{name} is off by {error:.1e} on rank {rank} of {world}: {strategy}, {case}"


def _possible(strategy: str, case: Case, world: int, rows: int) -> bool:
    return strategy != "ulysses" or (rows == 1 and case.heads % world == 0)


@pytest.mark.timeout(3600)  # the whole product of 8 processes on 2 cores
@pytest.mark.parametrize(
    ("world", "rows"), [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (8, 1), (4, 2), (8, 2), (8, 4), (4, 4)]
)
def test_every_strategy_is_the_dense_softmax(world: int, rows: int, request: pytest.FixtureRequest) -> None:
    full = bool(request.config.getoption("--full"))
    heads = 15 if world in (3, 5) else 8
    cases = tuple(case for case in _cases(full, heads) if _possible(*case, world, rows))
    if not full and world * rows > 4:  # many processes on few cores: other cases in each of these groups
        cases = cases[rows % 2 :: 2]
    for start in range(0, len(cases), 200):
        some = cases[start : start + 200]
        run_distributed(world, _check, rows, some, truths(tuple(case for _, case in some)), timeout=600)


ODD = tuple(
    Case(tokens=tokens, layout=layout, heads=8, groups=2, documents=documents)
    for tokens, documents in ((1, None), (3, None), (2, (0, 1, 2)), (7, (0, 3, 3, 7)), (64, None), (101, (0, 40, 101)))
    for layout in ("contiguous", "zigzag", "striped:3", "balanced")
)


@pytest.mark.parametrize(("world", "rows"), [(4, 1), (4, 2)])
def test_sequences_shorter_than_the_group_and_of_any_length(world: int, rows: int) -> None:
    strategies = [strategy for strategy in STRATEGIES if rows == 1 or strategy != "ulysses"]
    cases = tuple((strategies[n % len(strategies)], case) for n, case in enumerate(ODD * 2))
    run_distributed(world, _check, rows, cases, truths(tuple(case for _, case in cases)))


def _check_float32(
    rank: int,
    world: int,
    cases: tuple[tuple[str, Case], ...],
    truth_of: list[dict[str, Tensor]],
    dense_of: list[dict[str, Tensor]],
) -> None:
    for (strategy, case), truth, one_device in zip(cases, truth_of, dense_of, strict=True):
        shard, key_shard = shards(case, world_group())
        lost = relative_errors(case, local_parts(one_device, shard, key_shard), truth, world_group())
        errors = relative_errors(case, over_ranks(case, torch.float32, world_group(), strategy), truth, world_group())
        for name, error in errors.items():
            # A few ulps where the dense sum happens to lose nothing.
            budget = max(4 * lost[name], 1e-6)
            assert error <= budget, f"{name}: {error:.1e} > {budget:.1e} on rank {rank} of {world}: {strategy}, {case}"


@pytest.mark.parametrize("dominant", [False, True], ids=["", "dominant-keys"])
@pytest.mark.parametrize("world", [2, 4])
def test_float32_loses_what_one_device_loses(world: int, dominant: bool) -> None:
    cases = tuple(
        (strategy, Case(layout=layout, heads=8, groups=groups, dominant_keys=dominant, documents=documents))
        for strategy, layout, groups, documents in (
            ("ring", "zigzag", 8, None),
            ("ring", "striped", 2, (0, 5, 5, 18, 23, 37)),
            ("ring", "balanced", 2, (0, 5, 5, 18, 23, 37)),
            ("allgather", "contiguous", 2, None),
            ("allgather", "zigzag", 8, (0, 30, 37)),
            ("ulysses", "zigzag", 2, None),
            ("ulysses", "striped:3", 1, (0, 20, 37)),
            ("mesh", "contiguous", 4, (0, 5, 5, 18, 23, 37)),
        )
    )
    alone = tuple(case for _, case in cases)
    run_distributed(world, _check_float32, cases, truths(alone), truths(alone, torch.float32))


def _check_subgroups(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    pairs = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2])]
    group = pairs[0 if rank in (1, 3) else 1]
    assert isinstance(group, dist.ProcessGroup)
    for strategy in STRATEGIES:
        for case, truth in zip(cases, truth_of, strict=True):
            errors = relative_errors(case, over_ranks(case, torch.float64, group, strategy), truth, group)
            assert max(errors.values()) <= 1e-10, (strategy, case, errors)


def test_two_subsets_of_the_ranks_at_once_in_every_strategy() -> None:
    cases = (
        Case(layout="zigzag", documents=(0, 5, 5, 18, 23, 37), heads=4, groups=2, sinks=True),
        Case(layout="striped", keys=19, key_layout="zigzag", heads=4, groups=1),
    )
    run_distributed(4, _check_subgroups, cases, truths(cases))
