"""What is kept for backward and what is computed again: the recipe's `memory` keys.

`config` has the keys and their checks, `policies` reads `memory.recompute`, `operators` names what can be kept, and
`recompute` runs a block under a policy.
"""

from longtrain.memory.config import MemoryConfig, check_memory
from longtrain.memory.policies import Policy, layer_policies
from longtrain.memory.recompute import run_block

__all__ = ["MemoryConfig", "Policy", "check_memory", "layer_policies", "run_block"]
