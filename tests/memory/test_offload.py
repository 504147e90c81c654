"""Offload: the same gradients, what is on the device when, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.errors import UsageError
from longtrain.memory import MemoryConfig, check_memory, idle_offload, offload
from longtrain.parallel import SequenceShard
from tests.memory.models import BOUNDS, Recorded, model_of, passes, with_policy

PATTERN = ("softmax", "gla", "softmax", "mamba2", "softmax")
CPU = torch.device("cpu")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """Offload as on an accelerator."""
    recorded = Recorded()
    monkeypatch.setattr(offload, "copies_for", lambda device: recorded)
    return recorded


@pytest.mark.parametrize("in_flight", [1, 2, 7])
@pytest.mark.parametrize(
    ("recompute", "what"), [("full", "inputs"), ("attention", "inputs"), ("attention", "attention")]
)
def test_the_gradients_are_the_same(recompute: str, what: str, in_flight: int, copies: Recorded) -> None:
    shard = SequenceShard(BOUNDS[-1], cu_seqlens=BOUNDS)
    truth, _ = passes(model_of(MemoryConfig(), pattern=PATTERN), shard)
    memory = with_policy(recompute, offload=what, offload_in_flight=in_flight, tile=7 if in_flight == 2 else None)
    if memory.tile:
        truth, _ = passes(model_of(MemoryConfig(tile=7), pattern=PATTERN), shard)
    assert not copies.events
    found, _ = passes(model_of(memory, pattern=PATTERN), shard)
    assert all(torch.equal(found[name], wanted) for name, wanted in truth.items())
    moved = [what for what, _ in copies.events]
    assert moved.count("out") == moved.count("back") >= len(PATTERN) + 6 * (what == "attention")


def test_copies_come_back_ahead_of_their_use_and_few_layers_are_under_way(copies: Recorded) -> None:
    shard = SequenceShard(BOUNDS[-1], cu_seqlens=BOUNDS)
    passes(model_of(with_policy("full", offload="inputs", offload_in_flight=2), pattern=PATTERN), shard)
    # Forward: the third layer waits for the copy of the first. Backward: two layers ahead of the one that runs.
    forward = [("out", 0), ("out", 1), ("wait out", 0), ("out", 2), ("wait out", 1), ("out", 3), ("wait out", 2)]
    backward = [("back", 4), ("back", 3), ("back", 2), ("wait back", 4), ("back", 1), ("wait back", 3)]
    assert copies.events[: len(forward) + 1] == [*forward, ("out", 4)]
    assert copies.events[len(forward) + 1 :][: len(backward)] == backward


def test_no_layer_holds_its_input_between_the_passes(copies: Recorded) -> None:
    shard, tokens = SequenceShard(9), torch.arange(9)[None]
    model = model_of(with_policy("full", offload="inputs"), pattern=("softmax", "gla"))
    given: list[Any] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: given.append(_weak(args[0])))
    losses = model(tokens, shard, tokens)
    assert len(given) == 2 and all(reference() is None for reference in given)
    assert isinstance(losses, Tensor)
    losses.sum().backward()


def _weak(x: Tensor) -> Any:
    import weakref

    return weakref.ref(x)


def test_backward_gives_back_once(copies: Recorded) -> None:
    shard, tokens = SequenceShard(5), torch.arange(5)[None]
    model = model_of(with_policy("full", offload="inputs"), pattern=("softmax",))
    losses = model(tokens, shard, tokens)
    assert isinstance(losses, Tensor)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="memory.offload"):
        losses.sum().backward()


def test_on_a_cpu_nothing_moves_and_that_is_said() -> None:
    assert offload.copies_for(CPU) is None
    said = idle_offload(MemoryConfig(recompute="full", offload="inputs"), CPU)
    assert said is not None and said.startswith("memory.offload changes nothing here")
    assert idle_offload(MemoryConfig(), CPU) is None


def test_no_pinned_memory_left_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: Any, **options: Any) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    copies = offload.StreamCopies.__new__(offload.StreamCopies)
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(UsageError, match=r"memory\.offload: no pinned host memory left for 24 bytes .*data\.length"):
        copies.out(torch.ones(6))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (MemoryConfig(offload="input"), r"memory\.offload: got 'input' \(nearest: 'inputs'\), expected one of none"),
        (MemoryConfig(offload="inputs"), r"memory\.offload: got 'inputs' with memory\.recompute = none"),
        (
            MemoryConfig("full", offload="attention"),
            r"memory\.offload: got 'attention', but .*offload=inputs would",
        ),
        (MemoryConfig("full", offload="inputs", offload_in_flight=0), r"memory\.offload_in_flight: got 0, expected 1"),
    ],
)
def test_what_cannot_work_is_refused(memory: MemoryConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_memory(memory, ["softmax"])
