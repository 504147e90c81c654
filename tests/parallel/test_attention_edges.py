"""Calls at the edges: ranks with different losses, compiled calls that cannot work, look-alike layouts, odd numbers."""

import copy
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longtrain.parallel import Layout, SequenceShard, explain_attention, sequence_parallel_attention
from tests.distributed import run_distributed
from tests.parallel.attention_cases import Case, whole_inputs
from tests.parallel.comparing import world_group

STRATEGIES = ("ring", "allgather", "ulysses", "mesh")


def _check_losses(rank: int, world: int) -> None:
    """The loss is lse on rank 0's tokens and out on all others: as on one device."""
    case = Case(tokens=21, heads=4, groups=2)
    inputs = whole_inputs(case)
    for layout in ("zigzag", "striped"):
        shard, alone = SequenceShard(21, world_group(), layout), SequenceShard(21)
        first = torch.zeros(21, dtype=torch.bool)
        first[shard.as_rank(0).positions] = True
        leaves = [inputs[name].clone().requires_grad_() for name in ("q", "k", "v")]
        out, lse = sequence_parallel_attention(leaves[0], leaves[1], leaves[2], alone)
        ((lse * inputs["dlse"])[:, first].sum() + (out * inputs["dout"])[:, ~first].sum()).backward()
        for strategy in STRATEGIES:
            local = [shard.split(inputs[name], dim=1).requires_grad_() for name in ("q", "k", "v")]
            out, lse = sequence_parallel_attention(local[0], local[1], local[2], shard, strategy=strategy)
            loss = lse * shard.split(inputs["dlse"], 1) if rank == 0 else out * shard.split(inputs["dout"], 1)
            loss.sum().backward()
            for mine, whole in zip(local, leaves, strict=True):
                assert mine.grad is not None and whole.grad is not None
                torch.testing.assert_close(mine.grad, shard.split(whole.grad, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_may_use_different_results(world: int) -> None:
    run_distributed(world, _check_losses)


def _call(q: torch.Tensor, k: torch.Tensor, shard: SequenceShard, options: dict[str, Any]) -> torch.Tensor:
    return sequence_parallel_attention(q, k, k, shard, **options)[0]


def _check_compiled_refusals(rank: int, world: int) -> None:
    shard, packed = SequenceShard(16, world_group()), SequenceShard(16, world_group(), cu_seqlens=[0, 5, 16])
    pretended = SequenceShard.pretend(16, rank=rank, world=world)
    good = (1, 8, 4, 8)
    refusals: list[tuple[tuple[int, ...], tuple[int, ...], SequenceShard, dict[str, Any], str]] = [
        ((1, 8, 3, 8), (1, 8, 3, 8), shard, {"strategy": "ulysses"}, "H = 3 query heads over 2 ranks"),
        ((1, 10, 4, 8), (1, 10, 4, 8), shard, {}, "q: got 10 tokens"),
        (good, (1, 6, 4, 8), shard, {}, "k: got 6 tokens"),
        ((2, 8, 4, 8), (2, 8, 4, 8), packed, {}, "2 packed documents with 2 batch rows"),
        (good, good, shard, {"strategy": "rign"}, "strategy: got 'rign'"),
        (good, good, shard, {"sinks": torch.zeros(1)}, "sinks: got shape"),
        (good, (1, 8, 3, 8), shard, {}, "k: got 3 heads"),
        (good, good, shard, {"strategy": "mesh", "ulysses_degree": 3}, "ulysses_degree: got 3"),
        (good, good, pretended, {}, "sends nothing"),
    ]
    for q, k, where, options, told in refusals:
        torch._dynamo.reset()
        compiled = torch.compile(_call, backend="aot_eager")
        with pytest.raises(Exception, match=told):  # the compiler may wrap the ValueError
            compiled(torch.randn(q), torch.randn(k), where, options)
    # One graph for several shards: what does not fit a later one is refused too.
    torch._dynamo.reset()
    compiled = torch.compile(_call, backend="aot_eager", dynamic=True)
    for length in (16, 16, 12):
        some = SequenceShard(length, world_group())
        compiled(torch.randn(1, length // 2, 4, 8), torch.randn(1, length // 2, 4, 8), some, {})
    with pytest.raises(ValueError, match="q: got 9 tokens"):
        compiled(torch.randn(1, 9, 4, 8), torch.randn(1, 9, 4, 8), SequenceShard(16, world_group()), {})


def test_compiled_calls_refuse_what_others_refuse() -> None:
    run_distributed(2, _check_compiled_refusals, timeout=200)


class Cut(Layout):
    """Two halves, on rank 0 and 1 or the other way round: one name for both."""

    def __init__(self, reverse: bool) -> None:
        self.reverse = reverse

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        part = world - 1 - rank if self.reverse else rank
        return np.array([[part * length // world, (part + 1) * length // world]])


def _check_look_alikes(rank: int, world: int) -> None:
    x = torch.randn(1, 4, 2, 4)
    mine = SequenceShard(4 * world, world_group(), Cut(reverse=rank == 0))
    with pytest.raises(ValueError, match=r"shard: rank 0 got .*'Cut' \(runs of all ranks: checksum"):
        sequence_parallel_attention(x, x, x, mine)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("outer", "inner"))
    mine = SequenceShard(4 * world, world_group() if rank == 0 else mesh)
    with pytest.raises(ValueError, match="over 4 ranks in 2 rows"):
        sequence_parallel_attention(x, x, x, mine, strategy="ring")


def test_layouts_of_one_name_and_groups_of_other_rows_are_told_apart() -> None:
    run_distributed(4, _check_look_alikes, timeout=20)


class Miscounted(Cut):
    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        right = super().count(positions, rank, world, length, cu_seqlens)
        return np.where(positions == length, right, np.maximum(right - 1, 0))


def test_a_layout_that_counts_wrong_is_refused() -> None:
    SequenceShard.pretend(9, rank=0, world=2, layout=Cut(False))
    with pytest.raises(ValueError, match=r"count\(\) up to position .* disagrees with runs"):
        SequenceShard.pretend(9, rank=0, world=2, layout=Miscounted(False))


def test_forward_mode_is_refused() -> None:
    x, shard = torch.randn(1, 5, 2, 4), SequenceShard(5)
    with pytest.raises(ValueError, match="q: got a tensor with a forward-mode tangent"):
        torch.func.jvp(lambda q: sequence_parallel_attention(q, x, x, shard)[0], (x,), (x,))


def test_numbers_of_numpy_are_numbers() -> None:
    x, shard = torch.randn(1, 5, 2, 4), SequenceShard(5)
    window: Any = (np.int64(3), 0)
    scale: Any = np.float32(0.5)
    out, _ = sequence_parallel_attention(x, x, x, shard, window=window, scale=scale)
    expected, _ = sequence_parallel_attention(x, x, x, shard, window=(3, 0), scale=0.5)
    assert torch.equal(out, expected)


def test_the_cost_model_refuses_what_the_call_refuses() -> None:
    shard = SequenceShard.pretend(64, rank=0, world=2)
    with pytest.raises(ValueError, match="kv_heads: got 3"):
        explain_attention(shard, heads=4, kv_heads=3, head_width=8)
    with pytest.raises(ValueError, match="window: got"):
        explain_attention(shard, heads=4, kv_heads=2, head_width=8, window=(-3, 0))


def _check_freed(rank: int, world: int) -> None:
    gone = []
    gc.disable()
    try:
        for strategy in STRATEGIES:
            shard = SequenceShard(12, dist.group.WORLD, "balanced", [0, 5, 12])
            x = torch.randn(1, shard.local_length, 2, 4, requires_grad=True)
            sequence_parallel_attention(x, x, x, shard, strategy=strategy)[0].sum().backward()
            gone.append(weakref.ref(shard))
            del shard
        assert [reference() for reference in gone] == [None] * len(gone)  # no cycles that wait for the collector
    finally:
        gc.enable()


def test_shards_and_their_plans_are_freed() -> None:
    run_distributed(2, _check_freed)


def test_a_copied_model_keeps_its_shard() -> None:
    shard = SequenceShard(5)
    assert copy.deepcopy({"shard": shard})["shard"] is shard
