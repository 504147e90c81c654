"""Attention whose heads go through a group at a time: the same numbers and bytes, in more messages and less memory."""

from dataclasses import replace

import pytest
import torch

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.attention.cost import Heads, estimates, hardware_of
from longtrain.parallel.communication import MessageCounter, count_messages
from tests.distributed import run_distributed
from tests.memory.allocations import allocated
from tests.parallel.attention_cases import Case, over_ranks
from tests.parallel.comparing import world_group

CASES = (
    Case(layout="zigzag", documents=(0, 5, 5, 18, 23, 37), heads=8, groups=4, sinks=True),
    Case(layout="zigzag", batch=2, heads=12, groups=4, value_width=5),
    Case(layout="striped", heads=4, groups=1, window=(9, None), softcap=2.5),
    Case(layout="contiguous", keys=19, key_layout="zigzag", heads=8, groups=8),  # some queries see no key
)


def _counted(case: Case, strategy: str) -> tuple[dict[str, torch.Tensor], MessageCounter]:
    with count_messages() as counter:
        results = over_ranks(case, torch.float64, world_group(), strategy)
    return results, counter


def _check_equal(rank: int, world: int) -> None:
    for case in CASES:
        for strategy in ("ring", "allgather", "mesh"):
            whole, messages = _counted(case, strategy)
            for at_once in (1, 3, case.groups):
                parts, more = _counted(replace(case, heads_at_once=at_once), strategy)
                for name, expected in whole.items():
                    # Bit for bit but for how a matrix product adds up numbers that lie otherwise in memory.
                    torch.testing.assert_close(parts[name], expected, rtol=1e-12, atol=1e-13)
                if strategy == "ring":  # (an all-gather sends some heads at a time of itself, padded)
                    passes = -(-case.groups // at_once)
                    assert more.count("exchange") == passes * messages.count("exchange")
                    assert sum(message.sent_bytes for message in more.messages if message.kind == "exchange") == sum(
                        message.sent_bytes for message in messages.messages if message.kind == "exchange"
                    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_groups_of_heads_are_all_heads(world: int) -> None:
    run_distributed(world, _check_equal)


def _peaks(heads_at_once: int | None) -> tuple[int, int]:
    """Bytes of forward and of backward."""
    shard = SequenceShard(2048)
    q, k, v = (torch.randn(1, 2048, heads, 32).bfloat16().requires_grad_() for heads in (16, 8, 8))
    made: list[torch.Tensor] = []

    def forward() -> None:
        made.append(sequence_parallel_attention(q, k, v, shard, heads_at_once=heads_at_once)[0])

    first = allocated(forward).peak
    gradient = torch.randn_like(made[0])
    return first, allocated(lambda: torch.autograd.grad(made[0], (q, k, v), gradient)).peak


def test_what_is_float32_lives_for_one_group() -> None:
    number = 2048 * 32  # of one head
    (forward, backward), (few_forward, few_backward) = _peaks(None), _peaks(1)
    assert forward > 4 * number * 16 and backward > 4 * number * 3 * 16  # out; out, dout and dq
    results = 2 * number * 16 + 4 * 2048 * 16, 2 * number * 32
    # Of one key head and its two query heads the same, and what a tile holds.
    assert few_forward - results[0] < (forward - results[0]) / 4
    assert few_backward - results[1] < (backward - results[1]) / 4


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "all"])
def test_what_is_no_number_of_heads_is_refused(given: object) -> None:
    x = torch.randn(1, 5, 2, 4)
    with pytest.raises(ValueError, match=f"heads_at_once: got {given!r}, expected a number of key heads from 1 on"):
        sequence_parallel_attention(x, x, x, SequenceShard(5), heads_at_once=given)  # pyright: ignore[reportArgumentType]


def test_more_messages_cost_their_latency() -> None:
    shard, hardware = SequenceShard.pretend(4096, rank=0, world=4, layout="zigzag"), hardware_of("cuda")
    found = [
        {row.strategy: row for row in estimates(shard, shard, sizes, causal=True, window=None, hardware=hardware)}
        for sizes in (Heads(1, 16, 8, 64, 64, 2, at_once) for at_once in (None, 1))
    ]
    for strategy in ("ring", "allgather"):
        one, many = (rows[strategy] for rows in found)
        assert many.sent == one.sent and many.work == one.work
        assert many.exposed > one.exposed
