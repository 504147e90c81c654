"""Messages: any sizes, dtypes and groups arrive as they were sent, and nothing is sent where nothing need be."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.parallel import communication
from longtrain.parallel.communication import (
    Exchange,
    Group,
    accumulation_dtype,
    all_gather_bytes,
    all_gather_parts,
    all_gather_stacked,
    all_to_all_parts,
    count_messages,
    grid_of,
    rank_and_size,
    reduce_scatter_parts,
    same_group,
)
from tests.distributed import run_distributed
from tests.parallel.sequences import random

DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64,
    torch.int64, torch.int16, torch.uint8, torch.bool,
)  # fmt: skip


def equal(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def own_group(rank: int, world: int, group_ranks: list[int] | None) -> Group:
    """The whole world, or this rank's half of it: both halves talk at the same time."""
    if group_ranks is None:
        return dist.group.WORLD
    others = [other for other in range(world) if other not in group_ranks]
    group, _ = dist.new_subgroups_by_enumeration([group_ranks, others])
    assert isinstance(group, dist.ProcessGroup)
    return group


def check_collectives(rank: int, world: int, group_ranks: list[int] | None) -> None:
    group = own_group(rank, world, group_ranks)
    me, size = rank_and_size(group)
    for sizes in ([3] * size, [2 * other for other in range(size)], [0] * size, [5] + [0] * (size - 1)):
        for dtype in DTYPES:
            parts = [random((rows, 2, 3), other, dtype) for other, rows in enumerate(sizes)]
            sideways = parts[me].transpose(1, 2).contiguous().transpose(1, 2)  # not contiguous
            assert equal(all_gather_parts(sideways, sizes, group), torch.cat(parts))
        # Rank a sends sizes[(a + b) % size] rows to rank b.
        send_sizes = [sizes[(me + other) % size] for other in range(size)]
        rows = {
            (a, b): random((sizes[(a + b) % size], 4), 10 * a + b, torch.bfloat16)
            for a in range(size)
            for b in range(size)
        }
        sent = torch.cat([rows[me, other] for other in range(size)])
        received = all_to_all_parts(sent, send_sizes, send_sizes, group)
        assert equal(received, torch.cat([rows[other, me] for other in range(size)]))
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            wholes = [random((sum(sizes), 3), 100 + other, dtype) for other in range(size)]
            total = wholes[0].to(accumulation_dtype(dtype))
            for whole in wholes[1:]:
                total = total + whole
            start = sum(sizes[:me])
            assert equal(reduce_scatter_parts(wholes[me], sizes, group), total[start : start + sizes[me]])
    handles = [all_gather_stacked(random((2, 3), 7 * me + number), group) for number in range(3)]  # all under way
    for number, handle in enumerate(handles):
        assert equal(handle.wait(), torch.stack([random((2, 3), 7 * other + number) for other in range(size)]))
    texts = ["", "\0", "a longer text " * 50]
    expected = [texts[other % 3].encode() for other in range(size)]
    assert all_gather_bytes(expected[me], group, device=torch.device("cpu")) == expected


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_carry_uneven_parts_of_every_dtype(world: int) -> None:
    run_distributed(world, check_collectives, None)


def test_collectives_in_two_subgroups_at_once() -> None:
    run_distributed(4, check_collectives, [1, 3])


def check_exchanges(rank: int, world: int) -> None:
    """Everyone sends to everyone, itself included, with two exchanges under way that are waited for out of order."""
    first = {(a, b): random((a + b,), 10 * a + b) for a in range(world) for b in range(world)}
    exchanges, results = [], []
    for factor in (1, 2):
        received = [torch.empty(other + rank, dtype=torch.float64) for other in range(world)]
        sends = [(other, factor * first[rank, other]) for other in range(world)]
        exchanges.append(Exchange(sends, list(enumerate(received)), dist.group.WORLD))
        results.append(received)
    for exchange in reversed(exchanges):
        exchange.wait()
    for factor, received in zip((1, 2), results, strict=True):
        for other in range(world):
            assert equal(received[other], factor * first[other, rank])


def test_exchanges_between_all_pairs() -> None:
    run_distributed(3, check_exchanges)


def check_staging(rank: int, world: int) -> None:
    """Everything once more through host buffers, as gloo needs it for tensors on an accelerator."""
    made, staged = communication._Transport.__init__, []

    def make_staged(self: Any, group: Group, device: torch.device) -> None:
        made(self, group, device)
        assert not self._staged
        self._staged = True
        staged.append(self)

    with patch.object(communication._Transport, "__init__", make_staged):
        check_collectives(rank, world, None)
        check_exchanges(rank, world)
    assert staged


def test_staging_through_the_host_changes_nothing() -> None:
    run_distributed(3, check_staging)


def check_devices(rank: int, world: int) -> str:
    def staged(config: str, device: str) -> bool:
        with patch.object(dist, "get_backend_config", lambda group: config):
            return communication._Transport(dist.group.WORLD, torch.device(device))._staged

    assert [staged("cpu:gloo,cuda:nccl", device) for device in ("cpu", "cuda", "xpu")] == [False, False, True]
    assert staged("cpu:gloo,cuda:gloo", "cuda")
    with pytest.raises(ValueError, match="cannot move tensors on cpu") as refusal:
        staged("cuda:nccl", "cpu")
    return str(refusal.value)


def test_devices_are_served_by_their_backend_or_through_the_host_or_refused() -> None:
    (told,) = run_distributed(1, check_devices)
    assert "cuda: nccl" in told


def count_traffic(rank: int, world: int) -> None:
    group = dist.group.WORLD
    x = torch.zeros(5, 2, dtype=torch.float32)
    with count_messages() as outer:
        with count_messages() as inner:
            all_gather_stacked(x, group).wait()
            assert (inner.sent_bytes, inner.received_bytes) == ((world - 1) * 40,) * 2
        with count_messages() as inner:
            sizes = [[3, 1, 1], [1, 0, 4], [1, 4, 0]]
            all_to_all_parts(x, sizes[rank], [row[rank] for row in sizes], group)
            assert inner.sent_bytes == (5 - sizes[rank][rank]) * 8
        with count_messages() as inner:
            right, left = (rank + 1) % world, (rank - 1) % world
            Exchange([(right, x), (right, x[:0])], [(left, x.clone()), (left, x[:0].clone())], group).wait()
            assert (inner.count("exchange"), inner.sent_bytes, inner.received_bytes) == (1, 40, 40)
        with count_messages() as inner:  # nothing to send: no message
            Exchange([(right, x[:0])], [(left, x[:0].clone())], group).wait()
            all_gather_parts(x[:0], [0] * world, group)
            all_gather_stacked(x[:, :0], group).wait()
            all_to_all_parts(x[:, :0], sizes[rank], [row[rank] for row in sizes], group)
            assert inner.count() == 0
    assert outer.count() == 3 and outer.count("all_to_all") == 1
    all_gather_stacked(x, group).wait()
    assert outer.count() == 3


def test_messages_are_counted_and_empty_ones_not_sent() -> None:
    run_distributed(3, count_traffic)


def test_alone_nothing_is_sent() -> None:
    x = torch.randn(4, 2)
    with count_messages() as counter:
        assert rank_and_size(None) == (0, 1)
        assert all_gather_parts(x, [4], None) is x and all_to_all_parts(x, [4], [4], None) is x
        assert equal(reduce_scatter_parts(x.bfloat16(), [4], None), x.bfloat16().float())
        assert equal(all_gather_stacked(x, None).wait(), x[None])
        assert all_gather_bytes(b"alone", None, device=torch.device("cpu")) == [b"alone"]
        received = torch.empty_like(x)
        Exchange([(0, x)], [(0, received)], None).wait()
        assert equal(received, x)
    assert counter.count() == 0


def test_sums_do_not_write_to_their_input() -> None:
    x = torch.randn(4, 2)
    before = x.clone()
    reduce_scatter_parts(x, [4], None).add_(1)
    assert equal(x, before)


def test_misuse_is_refused() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="contiguous"):
        Exchange([(0, x)], [(0, torch.zeros(2, 3).T)], None)
    with pytest.raises(ValueError, match=r"x: got shape \[3, 2\], expected sizes\[0\] = 4 rows"):
        all_gather_parts(x, [4], None)
    with pytest.raises(ValueError, match=r"expected sum\(send_sizes\) = 2 rows"):
        all_to_all_parts(x, [2], [3], None)
    with pytest.raises(ValueError, match=r"expected sum\(sizes\) = 5 rows"):
        reduce_scatter_parts(x, [5], None)
    with pytest.raises(ValueError, match="group: got 'world'"):
        grid_of("world")  # pyright: ignore[reportArgumentType] - the refusal is what is tested
    with pytest.raises(RuntimeError, match="not initialised"):
        communication.process_count()
    assert grid_of(None).group is None and same_group(None, None)


def compare_groups(rank: int, world: int) -> None:
    world_group = dist.group.WORLD
    one, other = dist.new_group([0, 1]), dist.new_group([0, 1])
    assert isinstance(one, dist.ProcessGroup) and isinstance(other, dist.ProcessGroup)
    assert same_group(one, one) and not same_group(one, other)
    assert not same_group(one, world_group) and not same_group(None, world_group)


def test_groups_are_the_same_only_if_they_are_one() -> None:
    run_distributed(2, compare_groups)
