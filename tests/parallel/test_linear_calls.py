"""What a scan over ranks plans, sends, hands on and refuses, and which gradients it gives."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longtrain.parallel import SequenceShard, sequence_parallel_linear_attention
from longtrain.parallel.communication import count_messages
from longtrain.parallel.scan import scan_plan
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group
from tests.parallel.linear_cases import (
    BATCHED,
    CASES,
    Case,
    local_parts,
    over_ranks,
    recurrence,
    run,
    whole_inputs,
)


def _check_messages(rank: int, world: int) -> None:
    for tokens in (24, 240):
        case = Case(tokens=tokens, layout="zigzag", decay="channel", initial=True, state=True)
        shard = SequenceShard(case.tokens, world_group(), case.layout)
        local = local_parts(whole_inputs(case), shard)
        state, runs = 4 * case.heads * case.key_width * case.value_width, min(world, 2)
        for _ in range(2):
            leaves = {name: local[name].bfloat16().requires_grad_() for name in ("q", "k", "v", "decay", "initial_S")}
            with count_messages() as counter:
                out, final = run(leaves, shard, leaves["initial_S"])
            # The handshake; then one float32 (transition, state) for each run, however long it is ...
            handshake = int(world > 1)
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
    torch.testing.assert_close(state, at_once["state_S"], rtol=1e-11, atol=1e-12)


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
        out, state = run(leaves, shard, local["initial_S"])
        assert state is not None
        torch.autograd.backward([out, state], [local["dout"], weight * local["dstate_S"]])
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
            for piece, after in zip(plan.runs, [*plan.runs[1:], None], strict=True):
                assert piece.continues == (piece.start not in starts)
                assert piece.passes == (not any(piece.start < start < piece.stop for start in starts))
                assert piece.stop == (31 if after is None else after.start)
            mine = [piece for piece in plan.runs if piece.rank == shard.rank]
            positions = shard.positions.tolist()
            for piece, first, last in zip(mine, plan.first, plan.last, strict=True):
                assert positions[shard.segments[first].start] == piece.start
                assert positions[shard.segments[last].stop - 1] == piece.stop - 1


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
        ({"log_decay": torch.ones(4)}, "log_decay: got 1"),
        ({"log_decay": -torch.ones(3)}, "log_decay: got shape"),
        ({"initial_state": torch.zeros(2, 4, 5, 3)}, "initial_state: got shape"),
        ({"initial_state": torch.zeros(4, 5, 3)}, "initial_state: got shape"),
        ({"return_state": 1}, "return_state: got 1"),
        ({"scale": float("inf")}, "scale: got inf"),
        ({"strategy": "ring"}, "strategy: got 'ring', expected one of 'auto', 'allgather'"),
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
