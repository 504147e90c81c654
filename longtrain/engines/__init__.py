"""Engines: who shards weights, gradients and optimizer state over the ranks, and takes the optimizer's steps.

`fsdp` is torch's `fully_shard` and the default, `deepspeed` is ZeRO. An engine is made from a `Setup`; the trainer
knows no other word of it than those of `Engine`.
"""

from longtrain.engines.base import PRECISIONS, Engine, EngineFactory, Setup
from longtrain.engines.deepspeed import DeepSpeedEngine
from longtrain.engines.deepspeed_config import (
    DeepSpeedConfig,
    Wanted,
    check_deepspeed,
    check_options,
    deepspeed_json,
    fit_buffers,
    own_buffers,
)
from longtrain.engines.fsdp import FSDPConfig, FSDPEngine, check_fsdp, check_replicas

__all__ = [
    "PRECISIONS",
    "DeepSpeedConfig",
    "DeepSpeedEngine",
    "Engine",
    "EngineFactory",
    "FSDPConfig",
    "FSDPEngine",
    "Setup",
    "Wanted",
    "check_deepspeed",
    "check_fsdp",
    "check_options",
    "check_replicas",
    "deepspeed_json",
    "fit_buffers",
    "own_buffers",
]
