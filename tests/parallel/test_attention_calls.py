"""What a call of ring attention sends, keeps and refuses, and which gradients it gives."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed
from tests.parallel.attention_cases import GROUPED, Case, local_parts, over_ranks, shards, whole_inputs
from tests.parallel.comparing import world_group


def _check_messages(rank: int, world: int) -> None:
    case = Case(tokens=41, layout="zigzag", heads=4, groups=2, value_width=4)
    shard, _ = shards(case, world_group())
    local = local_parts(whole_inputs(case), shard, None)
    for _ in range(2):
        q, k, v = (local[name].bfloat16().requires_grad_() for name in ("q", "k", "v"))
        with count_messages() as counter:
            out, _ = sequence_parallel_attention(q, k, v, shard)
        # The handshake; then this rank's K and V, in two bytes a number, to every other rank: the keys that it sees. In
        # zigzag all see some of the late chunk, and those before this rank nothing of the early one.
        assert counter.count("all_gather") == (world > 1)
        assert counter.count("exchange") == world - 1 and counter.count() == 2 * (world > 1) + max(world - 2, 0)
        row = 2 * case.groups * (case.key_width + case.value_width)
        sizes = [shard.as_rank(reader).intervals(rank) for reader in range(world) if reader != rank]
        shown = [int(keys.hi.max() - keys.lo.min()) for keys in sizes]
        assert sum(x.sent_bytes for x in counter.messages if x.kind == "exchange") == row * sum(shown)
        with count_messages() as counter:
            out.backward(torch.ones_like(out))
        # In backward the same but for the last hop of forward, and the float32 shares of dK and dV one step behind.
        assert counter.count() == counter.count("exchange") == max(world, 1) - (world == 1)
        seen = [shard.intervals(source) for source in range(world) if source != rank]
        returned = sum(int(keys.hi.max() - keys.lo.min()) for keys in seen)
        last = shown[(rank - 1) % world - ((rank - 1) % world > rank)] if world > 1 else 0
        assert counter.sent_bytes == row * (sum(shown) - last) + 2 * row * returned


@pytest.mark.parametrize("world", [1, 3])
def test_messages_are_those_of_the_ring(world: int) -> None:
    run_distributed(world, _check_messages)


def _check_partial_gradients(rank: int, world: int) -> None:
    case = GROUPED
    expected = over_ranks(case, torch.float64, world_group())
    shard, _ = shards(case, world_group())
    local = local_parts(whole_inputs(case), shard, None)
    for wanted in (("q",), ("k",), ("q", "v")):
        # Non-contiguous inputs on the way: heads and tokens in each other's place in memory.
        q, k, v = (local[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v"))
        leaves = {"q": q, "k": k, "v": v}
        for name in wanted:
            leaves[name].requires_grad_()
        out, lse = sequence_parallel_attention(q, k, v, shard)
        torch.autograd.backward([out, lse], [local["dout"], local["dlse"]])
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, expected["d" + name], rtol=1e-11, atol=1e-13)
            else:
                assert leaf.grad is None
    # Without any gradient wanted nothing is kept.
    with torch.no_grad():
        out, lse = sequence_parallel_attention(q, k, v, shard)
    assert not out.requires_grad and not lse.requires_grad
    # Ranks may use different results in their losses: lse alone here, out alone there.
    q, k, v = (local[name].clone().requires_grad_() for name in ("q", "k", "v"))
    out, lse = sequence_parallel_attention(q, k, v, shard)
    (lse if rank == 0 else out).square().sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


def test_gradients_only_where_wanted_and_any_strides() -> None:
    run_distributed(2, _check_partial_gradients)


def test_autocast_changes_nothing() -> None:
    for case in (Case(), Case(softcap=2.0, sinks=True)):  # the native tile, and matrix products
        expected = over_ranks(case, torch.float32, None)
        with torch.autocast("cpu", torch.bfloat16):
            results = over_ranks(case, torch.float32, None)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def _given() -> dict[str, object]:
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 6)
    return {"q": q, "k": k, "v": v, "shard": SequenceShard(9)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": torch.randn(9, 4, 8)}, r"q: .*\[B, T_w, H, K\]"),
        ({"k": torch.randn(1, 9, 2, 8, 1)}, r"k: .*\[B, S_w, G, K\]"),
        ({"q": torch.ones(1, 9, 4, 8, dtype=torch.int64)}, "q: got dtype torch.int64"),
        ({"q": torch.randn(1, 8, 4, 8)}, "q: got 8 tokens .* shard.local_length = 9"),
        ({"k": torch.randn(1, 8, 2, 8), "v": torch.randn(1, 8, 2, 6)}, "k: got 8 tokens .* shard.local_length = 9"),
        ({"v": torch.randn(1, 8, 2, 6)}, "v: got shape"),
        ({"k": torch.randn(1, 9, 3, 8), "v": torch.randn(1, 9, 3, 6)}, "k: got 3 heads, expected a divisor of q's 4"),
        ({"k": torch.randn(1, 9, 2, 7)}, "k: got shape"),
        ({"k": torch.randn(1, 9, 2, 8, dtype=torch.float64)}, "k: got dtype torch.float64, expected that of q"),
        ({"v": torch.randn(1, 9, 2, 6, device="meta")}, "v: got device meta"),
        ({"sinks": torch.zeros(3)}, "sinks: got shape"),
        ({"shard": None}, "shard: got NoneType"),
        ({"shard": SequenceShard.pretend(27, rank=1, world=3)}, "shard: .* group=group"),
        ({"key_shard": SequenceShard.pretend(27, rank=1, world=3)}, "key_shard: .* same group"),
        ({"key_shard": 9}, "key_shard: got int"),
        ({"key_shard": SequenceShard(9, cu_seqlens=[0, 4, 9])}, "key_shard: got 2 documents, expected 1"),
        ({"key_shard": SequenceShard(10)}, "k: got 9 tokens .* key_shard.local_length = 10"),
        ({"causal": 1}, "causal: got 1"),
        ({"window": (-1, 0)}, "window: got"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        (
            {"strategy": "rings"},
            "strategy: got 'rings', expected one of 'auto', 'ring', 'allgather', 'ulysses', 'mesh'",
        ),
        ({"ulysses_degree": 2}, "ulysses_degree: got 2 with strategy 'auto', expected None"),
        ({"strategy": "ring", "ulysses_degree": 2}, "ulysses_degree: got 2 with strategy 'ring'"),
        ({"strategy": "allgather", "ulysses_degree": 2}, "ulysses_degree: got 2 with strategy 'allgather'"),
        ({"strategy": "mesh", "ulysses_degree": 2}, "ulysses_degree: got 2 .* expected a divisor of both: 1"),
        ({"strategy": "mesh", "ulysses_degree": 0}, "ulysses_degree: got 0"),
        ({"strategy": "mesh", "ulysses_degree": True}, "ulysses_degree: got True"),
        ({"backend": "triton"}, "backend: got 'triton'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], named: str) -> None:
    arguments = _given() | changes
    q, k, v, shard = (arguments.pop(name) for name in ("q", "k", "v", "shard"))
    with pytest.raises(ValueError, match=named):
        sequence_parallel_attention(q, k, v, shard, **arguments)  # pyright: ignore[reportArgumentType] that is the test


def _check_refusals_over_ranks(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    flat, grid = SequenceShard(8, world_group()), SequenceShard(8, mesh)
    other, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
    assert isinstance(other, dist.ProcessGroup)
    six, four = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 4, 4)
    refusals: list[tuple[torch.Tensor, SequenceShard, dict[str, Any], str]] = [
        (six, flat, {"strategy": "ulysses"}, "H = 6 query heads over 4 ranks, .* 'mesh' works with .* 1, 2, 'ring'"),
        (six, flat, {"strategy": "mesh", "ulysses_degree": 4}, "ulysses_degree: got 4 with H = 6 .* 4 ranks.* 1, 2"),
        (four, flat, {"strategy": "mesh", "ulysses_degree": 3}, "ulysses_degree: got 3"),
        (four, grid, {"strategy": "ulysses"}, "strategy: got 'ulysses' over a mesh of 2 x 2"),
        (four, grid, {"strategy": "mesh", "ulysses_degree": 4}, "2 ranks in a row, expected a divisor of both: 1, 2"),
        (four, flat, {"key_shard": SequenceShard(4, other)}, "key_shard: got .* expected a shard over the same group"),
        (four, flat, {"strategy": "ulysses", "ulysses_degree": 2}, "ulysses_degree: got 2 .* expected None or 4"),
    ]
    for x, shard, options, told in refusals:
        with count_messages() as counter, pytest.raises(ValueError, match=told):
            sequence_parallel_attention(x, x, x, shard, **options)
        assert counter.count() == 0
    sequence_parallel_attention(four, four, four, flat, strategy="ulysses", ulysses_degree=4)


def test_heads_and_meshes_that_a_strategy_cannot_have_are_refused() -> None:
    run_distributed(4, _check_refusals_over_ranks, timeout=30)


def test_packed_documents_need_one_row() -> None:
    q = torch.randn(2, 9, 4, 8)
    with pytest.raises(ValueError, match="2 packed documents with 2 batch rows"):
        sequence_parallel_attention(q, q, q, SequenceShard(9, cu_seqlens=[0, 4, 9]))
