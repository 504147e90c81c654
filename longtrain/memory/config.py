"""The recipe's `memory` keys and what cannot work among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longtrain.memory.policies import layer_policies


@dataclass(frozen=True)
class MemoryConfig:
    """Memory policies; `recipes/base.yaml` says what each key means."""

    recompute: Any = "none"  # none, full, attention, a list of operators, or one of these for each mixer
    tile: int | None = None  # tokens
    shard_blocks: bool = True


def check_memory(config: MemoryConfig, layers: Sequence[str]) -> None:
    """Refuse, with a ValueError that starts with the recipe's key, what cannot work.

    layers: the name of each layer's mixer, as the pattern has it.
    """
    layer_policies(config.recompute, layers)
    if config.tile is not None and config.tile < 1:
        raise ValueError(f"memory.tile: got {config.tile}, expected 1 or more tokens (null: all at once)")
