"""What a call of ring attention sends, keeps and refuses, and which gradients it gives."""

import pytest
import torch

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed
from tests.parallel.attention_cases import GROUPED, Case, local_parts, over_ranks, shards, whole_inputs
from tests.parallel.comparing import world_group


def _check_messages(rank: int, world: int) -> None:
    case = Case(tokens=41, layout="zigzag", heads=4, groups=2, value_width=4)
    shard, _ = shards(case, world_group())
    local = local_parts(whole_inputs(case), shard, None)
    for call in range(2):
        q, k, v = (local[name].bfloat16().requires_grad_() for name in ("q", "k", "v"))
        with count_messages() as counter:
            out, _ = sequence_parallel_attention(q, k, v, shard)
        # The handshake comes once; then K and V, in two bytes a number, of every rank but the previous ...
        assert counter.count("all_gather") == (call == 0 and world > 1)
        assert counter.count("exchange") == world - 1 and counter.count() == world - (call == 1 or world == 1)
        row = 2 * case.groups * (case.key_width + case.value_width)
        others = sum(shard.lengths) - shard.lengths[(rank + 1) % world]
        sent = sum(message.sent_bytes for message in counter.messages if message.kind == "exchange")
        assert sent == (row * others if world > 1 else 0)
        with count_messages() as counter:
            out.backward(torch.ones_like(out))
        # ... and in backward the same, with the float32 sums of dK and dV one step behind and one hop more.
        assert counter.count() == (world + 1 if world > 1 else 0)
        if world > 1:
            assert counter.sent_bytes == row * others + 2 * row * case.tokens


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
        ({"strategy": "allgather"}, "strategy: got 'allgather', .* what works is 'ring', also as 'auto'"),
        ({"strategy": "ulysses"}, "strategy: got 'ulysses'"),
        ({"strategy": "mesh"}, "strategy: got 'mesh'"),
        ({"strategy": "rings"}, "strategy: got 'rings', which does not exist"),
        ({"ulysses_degree": 2}, "ulysses_degree: got 2"),
        ({"backend": "triton"}, "backend: got 'triton'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], named: str) -> None:
    arguments = _given() | changes
    q, k, v, shard = (arguments.pop(name) for name in ("q", "k", "v", "shard"))
    with pytest.raises(ValueError, match=named):
        sequence_parallel_attention(q, k, v, shard, **arguments)  # pyright: ignore[reportArgumentType] that is the test


def test_packed_documents_need_one_row() -> None:
    q = torch.randn(2, 9, 4, 8)
    with pytest.raises(ValueError, match="2 packed documents with 2 batch rows"):
        sequence_parallel_attention(q, q, q, SequenceShard(9, cu_seqlens=[0, 4, 9]))
