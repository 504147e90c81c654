"""The cost model counts what really happens: pairs, keys, bytes; and "auto" takes what it finds shortest."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from longtrain.parallel import Hardware, SequenceShard, explain_attention, sequence_parallel_attention
from longtrain.parallel.attention import cost
from longtrain.parallel.attention.call import Window
from longtrain.parallel.attention.choice import choose
from longtrain.parallel.attention.cost import Estimate, Heads, estimates, traffic
from longtrain.parallel.attention.needs import Needs
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group

H100 = cost.hardware_of("cuda")
SIZES = Heads(batch=1, heads=8, groups=2, key_width=64, value_width=64, element_size=2)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "striped:3", "balanced"])
@pytest.mark.parametrize("window", [None, (7, 2)])
def test_pairs_and_keys_are_those_of_the_intervals(layout: str, window: Window) -> None:
    shard = SequenceShard.pretend(61, rank=0, world=4, layout=layout, cu_seqlens=[0, 9, 30, 30, 61])
    keys = SequenceShard.pretend(45, rank=0, world=4, layout="zigzag", cu_seqlens=[0, 5, 6, 20, 45])
    for key_shard in (shard, keys):
        counted = traffic(shard, key_shard, causal=window is None, window=window)
        needs = Needs(shard, key_shard, causal=window is None, window=window)
        for reader in range(4):
            for holder in range(4):
                intervals = shard.as_rank(reader).intervals(
                    holder,
                    key_shard=None if key_shard is shard else key_shard.as_rank(reader),
                    causal=window is None,
                    window=window,
                )
                seen = intervals.hi > intervals.lo
                part = (int(intervals.lo[seen].min()), int(intervals.hi[seen].max())) if seen.any() else (0, 0)
                assert counted.pairs[reader, holder] == intervals.area
                assert counted.keys[reader, holder] == part[1] - part[0]
                assert needs.part(reader, holder) == part


def test_a_sample_of_long_sequences_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = np.concatenate([[0], np.cumsum(np.random.default_rng(1).integers(50, 4000, 20))])
    shard = SequenceShard.pretend(int(bounds[-1]), rank=0, world=8, layout="zigzag", cu_seqlens=bounds)
    whole = traffic(shard, shard, causal=True, window=None)
    monkeypatch.setattr(cost, "_EVALUATIONS", 1 << 14)
    sampled = traffic(shard, shard, causal=True, window=None)
    assert not np.array_equal(sampled.pairs, whole.pairs)
    assert np.abs(sampled.pairs - whole.pairs).sum() < 0.02 * whole.pairs.sum()


def _found(shard: SequenceShard, sizes: Heads = SIZES, hardware: Hardware = H100, **options: Window) -> list[Estimate]:
    return estimates(shard, shard, sizes, causal=True, window=options.get("window"), hardware=hardware)


def _named(found: list[Estimate], strategy: str) -> Estimate:
    return next(row for row in found if row.strategy == strategy)


def test_work_is_the_slowest_ranks() -> None:
    contiguous, zigzag = (
        _found(SequenceShard.pretend(8192, rank=0, world=8, layout=name)) for name in ("contiguous", "zigzag")
    )
    # A contiguous ring's last rank sees whole blocks in each step but its own: 2 - 1/W times the balanced work.
    assert _named(contiguous, "ring").work / _named(zigzag, "ring").work == pytest.approx(2 - 1 / 8, rel=1e-3)
    # With all heads exchanged every rank has the same work, in any layout.
    assert _named(contiguous, "ulysses").work == pytest.approx(_named(zigzag, "ring").work, rel=1e-3)
    total = 2 * 8 * (64 + 64) * 8192 * 8193 / 2
    assert 8 * _named(contiguous, "ulysses").work == pytest.approx(total)


def test_links_and_shapes_decide() -> None:
    balanced = SequenceShard.pretend(65536, rank=0, world=8, layout="zigzag")
    assert _found(balanced)[0].strategy == "ring"
    # On slow links, with as many key heads as query heads, exchanging heads moves less than sending all keys around.
    slow = replace(H100, inner_bandwidth=1e9)
    assert _found(balanced, replace(SIZES, groups=8), slow)[0].strategy == "ulysses"
    # Where messages cost much and bytes nothing, a few gathers beat the many steps of a ring.
    chatty = Hardware(flops=1e18, inner_bandwidth=1e18, outer_bandwidth=1e18, latency=1e-3)
    assert _found(SequenceShard.pretend(4096, rank=0, world=8), SIZES, chatty)[0].strategy != "ring"
    # Unbalanced work is worth an exchange of heads; heads that do not divide leave the ring.
    contiguous = SequenceShard.pretend(65536, rank=0, world=8)
    assert _found(contiguous)[0].strategy == "ulysses"
    assert {row.strategy for row in _found(contiguous, replace(SIZES, heads=7, groups=7))} == {"ring", "allgather"}
    # A window that ends with the neighbour: the ring sends little else.
    windowed = _found(contiguous, window=(512, 0))
    assert _named(windowed, "ring").sent < 0.02 * _named(_found(contiguous), "ring").sent


def test_slow_links_between_rows_are_crossed_once() -> None:
    flat = SequenceShard.pretend(8192, rank=0, world=8, layout="zigzag")
    rows = SequenceShard.pretend(8192, rank=0, world=8, layout="zigzag", rows=2)
    slow = replace(H100, outer_bandwidth=1e8)
    assert (
        _named(_found(rows, hardware=slow), "ring").seconds
        < _named(_found(flat, hardware=replace(slow, inner_bandwidth=1e8)), "ring").seconds
    )
    assert {row.degree for row in _found(rows)} == {1, 2, 4}  # teams stay in a row


def test_the_table_names_everything() -> None:
    shard = SequenceShard.pretend(131072, rank=0, world=4)
    told = explain_attention(shard, heads=8, kv_heads=2, head_width=64, device="cuda")
    assert [line.split()[0] for line in told.splitlines()[1:5]] == ["ulysses", "mesh", "ring", "allgather"]
    assert "5.0e+14 FLOP/s" in told and "MiB received" in told.splitlines()[0]


def test_mesh_is_a_mesh_where_it_can_be() -> None:
    sizes = Heads(batch=1, heads=8, groups=2, key_width=64, value_width=64, element_size=4)
    options: dict[str, Any] = {"device": torch.device("cpu"), "causal": True, "window": None}
    for world, rows, expected in ((4, 1, {2}), (8, 1, {2, 4}), (4, 2, {2}), (3, 1, {1})):
        shard = SequenceShard.pretend(16 * world, rank=0, world=world, layout="zigzag", rows=rows)
        chosen, degree = choose("mesh", None, sizes=sizes, shard=shard, key_shard=shard, **options)
        assert chosen == "ring" and degree in expected


def _check_bytes(rank: int, world: int) -> None:
    """The bytes that the model counts are those that travel, where all ranks send alike."""
    shard = SequenceShard(64 * world, world_group(), "striped")
    sizes = Heads(batch=1, heads=4, groups=4, key_width=8, value_width=8, element_size=4)
    for row in estimates(shard, shard, sizes, causal=False, window=None, hardware=H100):
        q, k, v = (torch.randn(1, 64, 4, 8, requires_grad=True) for _ in range(3))
        with count_messages() as counter:
            degree = row.degree if row.strategy == "mesh" else None
            out, lse = sequence_parallel_attention(
                q, k, v, shard, causal=False, strategy=row.strategy, ulysses_degree=degree
            )
            (out.sum() + lse.sum()).backward()
        received = counter.received_bytes - 32 * (world - 1)
        # What forward held last does not travel again: the model leaves that out.
        assert row.sent * 0.7 <= received <= row.sent * 1.001, row.strategy


def test_counted_bytes_travel() -> None:
    run_distributed(4, _check_bytes)
