"""Attention that moves to another layout and back: the same numbers, moved only where it pays."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.layers import SequenceParallelAttention
from longtrain.parallel import SequenceShard, count_messages
from longtrain.parallel.attention import relaying
from longtrain.parallel.attention.cost import Heads, hardware_of
from longtrain.parallel.attention.relaying import attention_shard, layout_costs
from tests.distributed import run_distributed
from tests.parallel.comparing import relative_error, world_group
from tests.parallel.sequences import random

# The nine mixed documents of T = 16K: zigzag leaves a ring of 8 ranks waiting, "balanced" does not.
MIXED = np.cumsum([0, 6000, 3000, 2500, 1800, 1200, 900, 600, 300, 84])
SIZES = Heads(batch=1, heads=8, groups=2, key_width=64, value_width=64, element_size=2)
H100 = hardware_of("cuda")
LENGTH, BOUNDS = 61, [0, 30, 31, 31, 50, 61]


def _shard(layout: str = "zigzag", bounds: np.ndarray = MIXED, world: int = 8) -> SequenceShard:
    return SequenceShard.pretend(int(bounds[-1]), rank=0, world=world, layout=layout, cu_seqlens=bounds)


def test_it_moves_where_that_pays_and_stays_where_it_does_not() -> None:
    shard = _shard()
    slow_links = replace(H100, inner_bandwidth=1e8)
    home, even = layout_costs(shard, SIZES, hardware=replace(H100, flops=1e11), strategy="ring")
    assert (home.layout, even.layout) == ("home", "balanced")
    assert home.moves == 0 < even.moves and even.seconds < home.seconds
    home, even = layout_costs(shard, SIZES, hardware=slow_links, strategy="ulysses")
    assert home.seconds < even.seconds  # Ulysses is even on any layout: moving gains nothing
    assert len(layout_costs(_shard("balanced"), SIZES, hardware=H100)) == 1


def test_the_choice_is_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((1e10, "balanced"), (1e19, "zigzag")):
        monkeypatch.setattr(relaying, "hardware_of", lambda device, fast=fast: replace(H100, flops=fast))
        shard = _shard()
        options: dict[str, Any] = {"device": "cpu", "strategy": "ring"}
        assert attention_shard(shard, SIZES, layout="auto", **options).layout.name == expected
        assert attention_shard(shard, SIZES, layout="home", **options) is shard
        assert attention_shard(shard, SIZES, layout="striped:4", **options).layout.name == "striped:4"
    alone = SequenceShard(length=int(MIXED[-1]), cu_seqlens=MIXED)
    assert attention_shard(alone, SIZES, layout="striped", device="cpu") is alone


def test_the_tokens_that_the_model_counts_are_those_that_move() -> None:
    shard = _shard(bounds=np.array([0, 7, 40, 41, 97]), world=4)
    target = shard.with_layout("balanced")
    received = []
    for rank in range(4):
        plan = shard.as_rank(rank).relayout_plan(target.as_rank(rank))
        sent = [size for other, size in enumerate(plan.send_sizes) if other != rank]
        received += [sum(sent), sum(size for other, size in enumerate(plan.receive_sizes) if other != rank)]
    assert relaying._crossing(shard, target) == max(received) > 0


def _attend(shard: SequenceShard, module: SequenceParallelAttention) -> list[Tensor]:
    q, k, v, dout = (random((1, LENGTH, heads, width), 5 + n) for n, (heads, width) in enumerate(_SHAPES))
    q, k, v = (shard.split(x, dim=1).requires_grad_() for x in (q, k, v))
    out = module(q, k, v, shard)
    out.backward(shard.split(dout, dim=1))
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


_SHAPES = ((4, 6), (2, 6), (2, 3), (4, 3))


def _check(rank: int, world: int, truth: list[Tensor]) -> None:
    for home, layout, window in (
        ("zigzag", "balanced", None),
        ("contiguous", "striped:3", None),
        ("zigzag", "auto", None),
    ):
        shard = SequenceShard(LENGTH, world_group(), home, BOUNDS)
        module = SequenceParallelAttention(layout=layout, window=window, strategy="ring")
        with count_messages() as counter:
            found = _attend(shard, module)
        assert len(found) == 4
        for result, whole in zip(found, truth, strict=True):
            assert relative_error(result, shard.split(whole, dim=1), whole) < 1e-10
        if layout != "auto":
            with count_messages() as unmoved:
                _attend(shard.with_layout(layout), SequenceParallelAttention(strategy="ring"))
            # Two all-to-alls each way, and the handshake before the first.
            assert counter.count("all_to_all") - unmoved.count("all_to_all") == 4


@pytest.mark.parametrize("world", [2, 3])
def test_the_numbers_are_those_of_one_device(world: int) -> None:
    shard = SequenceShard(LENGTH, cu_seqlens=BOUNDS)
    run_distributed(world, _check, _attend(shard, SequenceParallelAttention()))


def test_bad_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layout: got 'balancd'; did you mean 'balanced'\?.*'home' or 'auto'"):
        SequenceParallelAttention(layout="balancd")
    with pytest.raises(ValueError, match=r"layout: got 3, expected a name \(home, auto, "):
        SequenceParallelAttention(layout=3)  # pyright: ignore[reportArgumentType]
    x, shard = torch.zeros(1, 4, 2, 4), SequenceShard(4)
    with pytest.raises(ValueError, match="layout: got 'striped' with a key_shard"):
        SequenceParallelAttention(layout="striped")(x, x, x, shard, key_shard=SequenceShard(4))


def _prepared(rank: int, world: int) -> bool:
    """After `prepare` a call works nothing out any more."""
    shard = SequenceShard(LENGTH, world_group(), "zigzag", BOUNDS)
    module = SequenceParallelAttention(layout="balanced", strategy="auto")
    module.prepare(shard, Heads(1, 4, 2, 6, 3, 8), device="cpu")
    target = shard.with_layout("balanced")
    before = [(set(kept), len(kept)) for kept in (*shard.plans.values(), *target.plans.values())]
    _attend(shard, module)
    after = [(set(kept), len(kept)) for kept in (*shard.plans.values(), *target.plans.values())]
    return before == after and sum(count for _, count in before) > 0


def test_prepared_batches_leave_nothing_to_work_out() -> None:
    assert all(run_distributed(2, _prepared))
