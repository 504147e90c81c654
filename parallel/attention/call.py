"""One call of sequence-parallel attention: all that it needs besides its tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from longtrain.parallel.shard import SequenceShard

Window = tuple[int | None, int | None] | None
Plan = TypeVar("Plan")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Options of a call, the same on all ranks of the group."""

    shard: SequenceShard
    key_shard: SequenceShard  # the shard itself in self-attention
    causal: bool
    window: Window
    scale: float
    softcap: float | None
    strategy: str  # "gather" or "ring"
    degree: int  # ranks that split the heads among them inside the ring; 1: none
    backend: str
    heads_at_once: int | None = None  # key heads, with their query heads, that a pass works on; None: all

    def planned(self, make: Callable[..., Plan]) -> Plan:
        """What `make` works out for this call's shards, mask and degree, kept on the shard for the other layers."""
        kept = self.shard.plans.setdefault(self.key_shard, {})
        key = (make.__name__, self.causal, self.window, self.degree)
        if key not in kept:
            kept[key] = make(self.shard, self.key_shard, causal=self.causal, window=self.window, degree=self.degree)
        return cast(Plan, kept[key])
