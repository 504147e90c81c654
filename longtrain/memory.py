"""What is kept for backward, what is computed again, and how the weights are spread: the recipe's `memory` keys."""

from dataclasses import dataclass

RECOMPUTE_POLICIES = ("none", "full")


@dataclass(frozen=True)
class MemoryConfig:
    """Memory policies."""

    recompute: str = "none"
    shard_blocks: bool = True
