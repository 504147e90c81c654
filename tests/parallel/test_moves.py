"""Tensors on their way between ranks, values and gradients, against whole tensors."""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longtrain.parallel.communication import count_messages
from longtrain.parallel.layouts import Layout
from longtrain.parallel.shard import SequenceShard
from tests.distributed import run_distributed
from tests.parallel.sequences import PerDocument, RandomAssignment, layouts, random


@given(data=st.data(), world=st.integers(1, 5), length=st.integers(0, 40), layout=layouts)
def test_split_takes_positions_and_gives_back_their_gradient(
    data: st.DataObject, world: int, length: int, layout: str | Layout
) -> None:
    rank = data.draw(st.integers(0, world - 1))
    shard = SequenceShard.pretend(length, rank=rank, world=world, layout=layout)
    whole = random((2, length, 3), 0).requires_grad_()
    part = shard.split(whole, dim=1)
    assert torch.equal(part, whole[:, shard.positions])
    assert part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or not part.numel()
    gradient = random(tuple(part.shape), 1)
    part.backward(gradient)
    expected = torch.zeros_like(whole)
    expected[:, shard.positions] = gradient
    assert whole.grad is not None and torch.equal(whole.grad, expected)
    labels = torch.arange(length)
    assert torch.equal(shard.split(labels, dim=-1), shard.positions)


def test_one_process_alone_gathers_what_it_split() -> None:
    shard = SequenceShard(11, layout="zigzag", cu_seqlens=[0, 4, 11])
    assert (shard.rank, shard.world, shard.lengths) == (0, 1, (11,))
    x = random((2, 11, 3), 0).requires_grad_()
    with count_messages() as counter:
        y = shard.gather(shard.relayout(shard.split(x, 1), shard.with_layout("striped"), 1), 1)
    assert torch.equal(x, y) and counter.count() == 0
    gradient = random((2, 11, 3), 1)
    assert torch.equal(torch.autograd.grad(y, x, gradient)[0], gradient)


def test_indices_first_used_in_inference_mode_serve_training_too() -> None:
    shard = SequenceShard(7, layout="striped")
    with torch.inference_mode():
        shard.split(torch.zeros(7), 0)
        positions = shard.positions
    weight = torch.ones(7, requires_grad=True)
    weight[positions].backward(torch.ones(7))  # keeps the index for backward, which inference tensors refuse
    assert weight.grad is not None


def test_positions_are_real_under_fake_tensors() -> None:
    shard = SequenceShard.pretend(9, rank=1, world=2, layout="zigzag")
    with FakeTensorMode():
        part = shard.split(torch.empty(1, 9, 4), dim=1)
        assert tuple(part.shape) == (1, 4, 4) and shard.intervals(0).area > 0
        made_inside = SequenceShard.pretend(9, rank=0, world=2, layout="zigzag")
        assert made_inside.segments[0].stop == 2
    assert shard.positions.tolist() == [2, 3, 4, 5]
    assert torch.equal(shard.split(torch.arange(9), 0), shard.positions)


class Case(NamedTuple):
    """One sequence and how it lies before and after a relayout."""

    length: int
    layout: str | Layout
    other: str | Layout
    cu_seqlens: list[int] | None = None


CASES = [
    Case(37, "zigzag", "contiguous", [0, 5, 5, 21, 37]),
    Case(37, "striped:3", "zigzag"),
    Case(23, RandomAssignment(5), PerDocument(), [0, 2, 17, 23]),
    Case(2, "contiguous", "striped"),  # fewer tokens than ranks
    Case(3, "zigzag", "striped:2"),
    Case(0, "striped", "contiguous"),
]


def check_moves(rank: int, world: int, group_ranks: list[int] | None) -> str:
    """Gather and relayout of every case in a group, values and gradients against whole tensors."""
    group = dist.group.WORLD
    if group_ranks is not None:  # both halves at work at the same time
        others = [other for other in range(world) if other not in group_ranks]
        group, _ = dist.new_subgroups_by_enumeration([group_ranks, others])
        assert isinstance(group, dist.ProcessGroup)
    for number, case in enumerate(CASES):
        check_case(group, case, seed=1000 * number)
    return "done"


def check_case(group: dist.ProcessGroup | None, case: Case, *, seed: int) -> None:
    shard = SequenceShard(case.length, group, case.layout, case.cu_seqlens)
    other = shard.with_layout(case.other)
    assert sum(shard.lengths) == case.length and shard.lengths[shard.rank] == shard.local_length
    shape = (2, case.length, 3)
    whole, gradient = random(shape, seed), [random(shape, seed + 1 + rank) for rank in range(shard.world)]

    local = shard.split(whole, dim=1).requires_grad_()
    gathered = shard.gather(local, dim=1)
    assert torch.equal(gathered, whole) and gathered.is_contiguous()
    (result,) = torch.autograd.grad(gathered, local, gradient[shard.rank])
    torch.testing.assert_close(result, sum(gradient)[:, shard.positions], rtol=1e-14, atol=1e-14)  # pyright: ignore[reportIndexIssue] - sum of tensors

    moved = shard.relayout(local, other, dim=1)
    assert torch.equal(moved, whole[:, other.positions])
    (result,) = torch.autograd.grad(moved, local, gradient[0][:, other.positions])
    assert torch.equal(result, gradient[0][:, shard.positions])
    assert torch.equal(other.relayout(moved, shard, dim=1), local)

    # Another dimension, counted from the end, of a tensor that is not contiguous.
    sideways = whole.transpose(0, 1)[shard.positions].permute(2, 1, 0)
    assert torch.equal(shard.gather(sideways, dim=-1), whole.permute(2, 0, 1))
    assert torch.equal(shard.relayout(sideways, other, dim=-1), whole.permute(2, 0, 1)[:, :, other.positions])

    for labels in (torch.arange(case.length), torch.arange(case.length) % 3 == 0):
        mine = shard.split(labels, dim=0)
        assert torch.equal(shard.gather(mine, dim=0), labels)
        assert torch.equal(shard.relayout(mine, other, dim=0), labels[other.positions])


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gather_and_relayout_move_values_and_gradients(world: int) -> None:
    assert run_distributed(world, check_moves, None) == ["done"] * world


def test_gather_and_relayout_in_two_subgroups_at_once() -> None:
    assert run_distributed(4, check_moves, [1, 3]) == ["done"] * 4


def gather_bfloat16(rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    shard = SequenceShard(19, dist.group.WORLD, "striped")
    local = shard.split(random((1, 19, 64), 0, torch.bfloat16), dim=1).requires_grad_()
    whole = shard.gather(local, dim=1)
    gradient = random((1, 19, 64), 1 + rank, torch.bfloat16)
    whole.backward(gradient)
    assert local.grad is not None
    return whole.detach(), shard.positions, local.grad


def test_bfloat16_gradients_are_summed_in_float32_in_the_order_of_ranks() -> None:
    world = 4
    gradients = [random((1, 19, 64), 1 + rank, torch.bfloat16) for rank in range(world)]
    expected, rounded_each_time = gradients[0].float(), gradients[0]
    for gradient in gradients[1:]:
        expected = expected + gradient.float()
        rounded_each_time = rounded_each_time + gradient
    assert not torch.equal(expected.bfloat16(), rounded_each_time)  # the test can tell
    for whole, positions, result in run_distributed(world, gather_bfloat16):
        assert torch.equal(whole, random((1, 19, 64), 0, torch.bfloat16))
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, expected.bfloat16()[:, positions])


def count_relayout(rank: int, world: int) -> list[tuple[int, int, int]]:
    shard = SequenceShard(30, dist.group.WORLD, "zigzag")
    other = shard.with_layout("contiguous")
    x = shard.split(random((1, 30, 4), 0), dim=1).requires_grad_()
    counts = []
    with count_messages() as counter:
        y = shard.relayout(x, other, dim=1)
    counts.append((counter.count(), counter.count("all_to_all"), counter.sent_bytes))
    with count_messages() as counter:
        y.backward(random(tuple(y.shape), 1))
    counts.append((counter.count(), counter.count("all_to_all"), counter.received_bytes))
    with count_messages() as counter:
        assert shard.relayout(x, shard, dim=1) is x
    assert counter.count() == 0
    stay = len(set(shard.positions.tolist()) & set(other.positions.tolist()))
    assert counts[0][2] == counts[1][2] == (shard.local_length - stay) * 4 * 8
    return counts


def test_relayout_is_one_message_each_way_and_sends_only_what_moves() -> None:
    for counts in run_distributed(3, count_relayout):
        assert [count[:2] for count in counts] == [(1, 1), (1, 1)]
