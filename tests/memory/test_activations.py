"""What a layer keeps for backward, in bytes, and that the logits are never whole."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.memory import MemoryConfig
from longtrain.parallel import SequenceShard
from tests.memory.allocations import allocated
from tests.memory.models import VOCABULARY, model_of, with_policy

LENGTH, WIDTH, HEADS = 1024, 128, 4


def _kept(memory: MemoryConfig, mixer: str, options: dict[str, Any], depth: int) -> int:
    """Bytes that live after forward."""
    model = model_of(memory, pattern=(mixer,) * depth, options={mixer: options}, width=WIDTH)
    shard = SequenceShard(LENGTH)
    tokens = torch.randint(VOCABULARY, (1, LENGTH))
    model(tokens, shard, tokens)  # what the shard works out once is not a layer's
    return allocated(lambda: model(tokens, shard, tokens)).held


def _per_token_and_layer(memory: MemoryConfig, mixer: str = "softmax", **options: Any) -> float:
    options = {"heads": HEADS, **options}
    return (_kept(memory, mixer, options, 5) - _kept(memory, mixer, options, 3)) / 2 / LENGTH


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "qk_norm": True}])
def test_under_attention_a_layer_keeps_its_input_and_out_and_lse(options: dict[str, Any]) -> None:
    needed = 4 * WIDTH + 4 * WIDTH + 4 * HEADS
    assert needed <= _per_token_and_layer(with_policy("attention"), **options) <= 1.02 * needed


def test_under_full_it_keeps_its_input_alone() -> None:
    assert 4 * WIDTH <= _per_token_and_layer(with_policy("full")) <= 1.02 * 4 * WIDTH


def test_kept_whole_norms_and_rotation_keep_their_inputs_alone() -> None:
    # x and its norm, twice, with a number for each token; q, k and v, and q and k turned; out and lse; gate and up and
    # their product.
    hidden = -(-WIDTH * 8 // 3 // 32) * 32
    needed = 4 * (4 * WIDTH + 2 + 5 * WIDTH + WIDTH + HEADS + 3 * hidden)
    assert _per_token_and_layer(MemoryConfig()) <= 1.02 * needed


def _peak_of_loss(vocabulary: int) -> int:
    model = model_of(MemoryConfig(), pattern=("softmax",))
    model.head.weight = model.embedding.weight = torch.nn.Parameter(torch.randn(vocabulary, 32))
    tokens, shard = torch.randint(vocabulary, (1, LENGTH)), SequenceShard(LENGTH)

    def step() -> Tensor:
        losses = model(tokens, shard, tokens)
        assert isinstance(losses, Tensor)
        losses.sum().backward()
        return losses

    return allocated(step).peak


def test_the_logits_are_never_whole() -> None:
    small, large = 2048, 16384
    # The embedding's gradient comes in two parts, of the head and of the inputs, which are added.
    assert _peak_of_loss(large) - _peak_of_loss(small) < 4 * LENGTH * (large - small) / 4
