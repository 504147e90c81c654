"""Recompute policies: the same gradients bit for bit, and the messages that each costs."""

from typing import Any

import pytest
import torch

from longtrain.layers.mixers import MIXERS
from longtrain.layers.mixers.base import StatefulMixer
from longtrain.memory import MemoryConfig
from longtrain.memory.operators import DISTRIBUTED
from longtrain.parallel import SequenceShard
from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)
from tests.distributed import run_distributed
from tests.memory.models import BOUNDS, model_of, passes, with_policy
from tests.parallel.comparing import world_group

# Those that run no ring, whose backward goes on from what forward held last, which recompute does not keep.
RECURRENT = tuple(name for name, mixer in MIXERS.items() if issubclass(mixer, StatefulMixer)) + ("mega", "moba", "rat")
OTHERS: tuple[Any, ...] = (
    list(DISTRIBUTED),
    ["attention", "aten::mm"],
    {"softmax": "attention", "gla": "full", "gated_deltanet": ["delta_rule"], "default": "none"},
)


def _check_policies(rank: int, world: int, layout: str, softmax: dict[str, Any], other: Any) -> None:
    shard = SequenceShard(BOUNDS[-1], world_group() if world > 1 else None, layout, BOUNDS)
    options = {"softmax": {"heads": 4, "kv_heads": 2, **softmax}}
    expected, (forward, plain) = passes(model_of(MemoryConfig(), options=options), shard)
    handshakes = ("all_gather", 32 * (world - 1))
    traffic = []
    for policy in ("full", "attention", other):
        found, (again, backward) = passes(model_of(with_policy(policy), options=options), shard)
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            assert torch.equal(found[name], truth), (policy, name)
        assert again == forward, policy
        traffic.append(backward)
    full, attention, _ = traffic
    # One more forward, to the byte; and of it nothing, not even the ranks' handshakes.
    assert full == attention + forward
    assert attention[handshakes] == plain[handshakes] == 0
    assert other != list(DISTRIBUTED) or traffic[2] == attention


@cover(
    {
        "world": [1, 2, 3, 4],
        "layout": ["zigzag", "striped"],
        "softmax": [{"qk_norm": True, "sinks": True}, {"layout": "balanced"}, {"strategy": "allgather"}],
        "other": OTHERS,
    }
)
def test_every_policy_has_the_same_gradients_and_attention_repeats_no_message(case: dict[str, Any]) -> None:
    run_distributed(case["world"], _check_policies, case["layout"], case["softmax"], case["other"], timeout=120)


def _check_recurrent(rank: int, world: int) -> None:
    shard = SequenceShard(BOUNDS[-1], world_group(), "zigzag", BOUNDS)
    _, (_, plain) = passes(model_of(MemoryConfig(), pattern=RECURRENT), shard)
    _, (_, kept) = passes(model_of(with_policy("attention"), pattern=RECURRENT), shard)
    assert plain == kept != {}


def test_backward_of_recurrent_mixers_sends_the_same_with_all_kept_and_with_attention() -> None:
    run_distributed(2, _check_recurrent)


def test_what_is_kept_is_given_back_once() -> None:
    model, shard = model_of(with_policy("attention"), pattern=("softmax",)), SequenceShard(5)
    tokens = torch.arange(5)[None]
    losses = model(tokens, shard, tokens)
    assert isinstance(losses, torch.Tensor)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        losses.sum().backward()


def test_without_gradients_nothing_is_recorded() -> None:
    model, shard = model_of(with_policy("attention"), pattern=("softmax", "gla")), SequenceShard(5)
    tokens = torch.arange(5)[None]
    plain = model_of(MemoryConfig(), pattern=("softmax", "gla"))
    with torch.no_grad():
        assert torch.equal(model(tokens, shard), plain(tokens, shard))  # type: ignore[arg-type]
