"""What is kept for backward and what is computed again: the recipe's `memory` keys.

`config` has the keys and their checks, `policies` reads `memory.recompute`, `operators` names what can be kept,
`recompute` runs a block under a policy, and `offload` puts what is kept into host memory.
"""

from longtrain.memory.config import MemoryConfig, check_memory, idle_offload, store_for
from longtrain.memory.policies import Policy, check_seen, layer_policies
from longtrain.memory.recompute import run_block

__all__ = [
    "MemoryConfig",
    "Policy",
    "check_memory",
    "check_seen",
    "idle_offload",
    "layer_policies",
    "run_block",
    "store_for",
]
