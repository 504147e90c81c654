"""The recipe's `memory` keys and what cannot work among them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from longtrain.errors import nearest
from longtrain.memory import offload
from longtrain.memory.policies import layer_policies

OFFLOADS = ("none", "inputs", "attention")


@dataclass(frozen=True)
class MemoryConfig:
    """Memory policies; `recipes/base.yaml` says what each key means."""

    recompute: Any = "none"  # none, full, attention, a list of operators, or one of these for each mixer
    tile: int | None = None  # tokens
    offload: str = "none"  # none, inputs (of layers), or attention (these and what recompute keeps)
    offload_in_flight: int = 2  # layers
    attention_heads: int | None = None  # key heads
    shard_blocks: bool = True


def check_memory(config: MemoryConfig, layers: Sequence[str]) -> None:
    """Refuse, with a ValueError that starts with the recipe's key, what cannot work.

    layers: the name of each layer's mixer, as the pattern has it.
    """
    policies = layer_policies(config.recompute, layers)
    if config.offload not in OFFLOADS:
        raise ValueError(
            f"memory.offload: got {config.offload!r}{nearest(config.offload, OFFLOADS)}, expected one of "
            f"{', '.join(OFFLOADS)}"
        )
    if config.offload != "none" and not any(policy.recompute for policy in policies):
        raise ValueError(
            f"memory.offload: got {config.offload!r} with memory.recompute = none, under which layers have no input of "
            "their own to put away; memory.recompute=attention or full would work"
        )
    if config.offload == "attention" and not any(policy.kept for policy in policies):
        raise ValueError(
            "memory.offload: got 'attention', but memory.recompute keeps no operator's results beside the inputs; "
            "memory.offload=inputs would work, or memory.recompute=attention"
        )
    if config.offload_in_flight < 1:
        raise ValueError(f"memory.offload_in_flight: got {config.offload_in_flight}, expected 1 or more layers")
    if config.tile is not None and config.tile < 1:
        raise ValueError(f"memory.tile: got {config.tile}, expected 1 or more tokens (null: all at once)")
    if config.attention_heads is not None and config.attention_heads < 1:
        raise ValueError(
            f"memory.attention_heads: got {config.attention_heads}, expected 1 or more key heads (null: all at once)"
        )


def store_for(config: MemoryConfig, device: torch.device) -> offload.Store | None:
    """Where a forward pass on a device puts away what recompute keeps; None: nowhere."""
    copies = None if config.offload == "none" else offload.copies_for(device)
    if copies is None or not torch.is_grad_enabled():
        return None
    return offload.Store(copies, in_flight=config.offload_in_flight, kept=config.offload == "attention")


def idle_offload(config: MemoryConfig, device: torch.device) -> str | None:
    """What to tell a user whose `memory.offload` changes nothing on this device; None where it does."""
    if config.offload == "none" or offload.copies_for(device) is not None:
        return None
    return "memory.offload changes nothing here: on a CPU activations lie in host memory"
