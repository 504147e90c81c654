"""Engines: who shards weights, gradients and optimizer state over the ranks, and takes the optimizer's steps.

`fsdp` is torch's `fully_shard` and the default. An engine is made from a `Setup`; the trainer knows no other word of
it than those of `Engine`.
"""

from longtrain.engines.base import PRECISIONS, Engine, EngineFactory, Setup
from longtrain.engines.fsdp import FSDPConfig, FSDPEngine, check_fsdp, check_replicas

__all__ = [
    "PRECISIONS",
    "Engine",
    "EngineFactory",
    "FSDPConfig",
    "FSDPEngine",
    "Setup",
    "check_fsdp",
    "check_replicas",
]
