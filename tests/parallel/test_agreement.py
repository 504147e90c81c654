"""Ranks that disagree about a call are all told the same, at once, and can go on; those that agree send 32 bytes."""

import time
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from longtrain import debug
from longtrain.parallel import SequenceShard, agreement, sequence_parallel_attention
from longtrain.parallel.agreement import agree
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed


def _disagree(rank: int, world: int, odd: dict[str, Any], expected: list[str]) -> str:
    """Rank 1 calls with `odd` changes; every rank returns what it is told."""
    options: dict[str, Any] = {"length": 12, "layout": "contiguous", "cu_seqlens": None, "dtype": torch.float32}
    options |= {"heads": 4, "groups": 2, "key_width": 8, "value_width": 8, "batch": 1, "requires_grad": False}
    given = options | (odd if rank == 1 else {})
    shard = SequenceShard(given.pop("length"), dist.group.WORLD, given.pop("layout"), given.pop("cu_seqlens"))
    dtype, batch, tokens = given.pop("dtype"), given.pop("batch"), shard.local_length
    key_width, groups = given.pop("key_width"), given.pop("groups")
    q = torch.randn(batch, tokens, given.pop("heads"), key_width, dtype=dtype)
    q.requires_grad_(given.pop("requires_grad"))
    k = torch.randn(batch, tokens, groups, key_width, dtype=dtype)
    v = torch.randn(batch, tokens, groups, given.pop("value_width"), dtype=dtype)
    begin = time.monotonic()
    with pytest.raises(ValueError) as told:
        sequence_parallel_attention(q, k, v, shard, **given)
    assert time.monotonic() - begin < 15  # a first call imports for some seconds; hanging would take minutes
    message = str(told.value)
    assert all(text in message for text in expected), message
    # Nothing is left over from the refused call: the ranks agree on the next one and it runs.
    shard = SequenceShard(9, dist.group.WORLD)
    x = torch.randn(1, 3, 2, 4)
    out, _ = sequence_parallel_attention(x, x, x, shard)
    assert out.shape == x.shape
    return message


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ({"length": 13}, ["length 12", "length 13"]),
        ({"layout": "zigzag"}, ["layout 'contiguous'", "layout 'zigzag'"]),
        ({"cu_seqlens": [0, 5, 12]}, ["cu_seqlens [0, 12]", "cu_seqlens [0, 5, 12]"]),
        ({"dtype": torch.float64}, ["float32 on cpu", "float64 on cpu"]),
        ({"heads": 2}, ["[1, T_w, 4, 8]", "[1, T_w, 2, 8]"]),
        ({"groups": 4}, ["[1, T_w, 2, 8]", "[1, T_w, 4, 8]"]),
        ({"key_width": 4}, ["[1, T_w, 4, 8]", "[1, T_w, 4, 4]"]),
        ({"value_width": 7}, ["v: ", "[1, T_w, 2, 7]"]),
        ({"batch": 2}, ["[2, T_w, 4, 8]"]),
        ({"causal": False}, ["causal: ranks 0, 2 got True; rank 1 got False"]),
        ({"window": (3, 0)}, ["window: ranks 0, 2 got None; rank 1 got (3, 0)"]),
        ({"scale": 0.5}, ["scale: "]),
        ({"softcap": 5.0}, ["softcap: ranks 0, 2 got None; rank 1 got 5.0"]),
        ({"sinks": torch.zeros(4)}, ["sinks: ranks 0, 2 got None; rank 1 got given"]),
        ({"requires_grad": True}, ["requires_grad: ranks 0, 2 got False; rank 1 got True"]),
        ({"backend": "reference"}, ["backend: ranks 0, 2 got torch; rank 1 got reference"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_every_rank_is_told_what_each_gave(odd: dict[str, Any], expected: list[str]) -> None:
    messages = run_distributed(3, _disagree, odd, expected, timeout=20)
    assert len(set(messages)) == 1
    assert "rank 1 got" in messages[0] and "ranks 0, 2 got" in messages[0]


def _disagree_on_keys(rank: int, world: int) -> str:
    shard = SequenceShard(8, dist.group.WORLD)
    key_shard = SequenceShard(8, dist.group.WORLD, "striped" if rank else "zigzag")
    x = torch.randn(1, 4, 2, 4)
    with pytest.raises(ValueError) as told:
        sequence_parallel_attention(x, x, x, shard, key_shard=key_shard, causal=False)
    return str(told.value)


def test_key_shards_are_compared_too() -> None:
    messages = run_distributed(2, _disagree_on_keys, timeout=20)
    assert messages[0] == messages[1]
    assert "key_shard: rank 0 got length 8 over 2 ranks, layout 'zigzag'" in messages[0]


def _count_handshakes(rank: int, world: int) -> None:
    shard = SequenceShard(9, dist.group.WORLD)
    x = torch.randn(1, 3, 2, 4)

    def handshakes(**options: Any) -> int:
        with count_messages() as counter:
            sequence_parallel_attention(x, x, x, shard, **options)
        gathers = [message for message in counter.messages if message.kind == "all_gather"]
        assert all(message.sent_bytes == 32 * (world - 1) for message in gathers)
        return len(gathers)

    for _ in range(2):  # on a CPU every call
        assert handshakes() == handshakes(causal=False) == 1
    one = SequenceShard(3)
    with count_messages() as counter:
        sequence_parallel_attention(x, x, x, one)
    assert counter.count() == 0


def test_one_handshake_for_each_call_and_none_alone() -> None:
    run_distributed(3, _count_handshakes)


def _disagree_after_agreeing(rank: int, world: int) -> None:
    shard = SequenceShard(4, dist.group.WORLD)
    x = torch.randn(1, 2, 2, 4)
    sequence_parallel_attention(x, x, x, shard)
    sequence_parallel_attention(x, x, x, shard, window=(1, 0))
    with pytest.raises(ValueError, match=r"window: rank 0 got None; rank 1 got \(1, 0\)"):
        sequence_parallel_attention(x, x, x, shard, window=(1, 0) if rank else None)
    sequence_parallel_attention(x, x, x, shard)


def test_a_rank_that_changes_its_mind_is_found() -> None:
    run_distributed(2, _disagree_after_agreeing, timeout=20)


def _agree_as_on_a_gpu(rank: int, world: int) -> None:
    shard, device = SequenceShard(4, dist.group.WORLD), torch.device("meta")  # any that is not the CPU

    def on_the_cpu(data: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(data.copy())

    def handshakes(signature: dict[str, object]) -> int:
        with count_messages() as counter, patch.object(agreement.torch, "tensor", on_the_cpu):
            agree(shard, signature, device=device)
        return counter.count()

    assert handshakes({"window": None}) == 1
    assert handshakes({"window": None}) == 0
    assert handshakes({"window": 3}) == 1  # another signature
    assert handshakes({"window": 3}) == handshakes({"window": None}) == 0
    with debug.checks():
        assert handshakes({"window": None}) == 1
    shard = SequenceShard(4, dist.group.WORLD)
    assert handshakes({"window": None}) == 1  # another shard


def test_where_the_host_would_wait_calls_are_compared_once() -> None:
    run_distributed(2, _agree_as_on_a_gpu)


def test_long_boundaries_are_shown_short_and_compared_whole() -> None:
    bounds = list(range(0, 1001, 10))
    one, other = SequenceShard(1000, cu_seqlens=bounds).signature, list(bounds)
    assert "[0, 10, 20, 30, 40, ..., 1000] (100 documents, checksum" in one and len(one) < 150
    other[70] += 1
    assert SequenceShard(1000, cu_seqlens=other).signature != one
