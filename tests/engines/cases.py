"""One SGD step of a small hybrid model, under any engine and spread any way: the gradient of every weight."""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from longtrain.data import IGNORE, VOCABULARY, PackedSequence
from longtrain.engines import DeepSpeedConfig, DeepSpeedEngine, EngineFactory, FSDPConfig, FSDPEngine
from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.optimizer import OptimizerConfig, ScheduleConfig
from longtrain.parallel import build_mesh
from longtrain.trainer import Trainer, TrainerConfig

# A step this long leaves nothing of the weights' own rounding in the difference that it makes.
RATE = 1e4
SGD = OptimizerConfig(name="sgd", learning_rate=RATE, weight_decay=0.0)
ONE_STEP = TrainerConfig(steps=1, sequences=4, clip=float("inf"))
LENGTH = 37
DOCUMENTS = [[5, 17, 18, 30], [9], [11, 20], []]
# What each sequence's labels leave out. uneven: a little; empty: of every sequence but its first tokens, so that the
# later ranks have nothing to predict; masked: whole sequences, so that some data ranks have nothing to predict.
MASKS = {
    "uneven": [slice(10, 12), slice(20, 37), slice(0, 0), slice(0, 3)],
    "empty": [slice(4, 37), slice(5, 37), slice(3, 37), slice(6, 37)],
    "masked": [slice(0, 37), slice(0, 37), slice(3, 5), slice(0, 37)],
}


class GivenSequences:
    """Hand-made sequences in the place of packed text."""

    fingerprint = "given"
    groups: tuple[int, ...] = ()

    def __init__(self, masks: str = "uneven") -> None:
        self.length = LENGTH
        random = np.random.default_rng(5)
        self.made = []
        for ends, mask in zip(DOCUMENTS, MASKS[masks], strict=True):
            tokens, labels = random.integers(0, 256, (2, LENGTH))
            labels[mask] = IGNORE
            self.made.append(PackedSequence(tokens, labels, np.array([0, *ends, LENGTH])))

    def __len__(self) -> int:
        return len(self.made)

    def group(self, index: int) -> int:
        return 0

    def sequence(self, index: int) -> PackedSequence:
        return self.made[index % len(self.made)]


def small_model(recompute: Any = "none", *, tile: int | None = None, tie: bool = True) -> Decoder:
    torch.manual_seed(3)
    layers = LayersConfig(
        pattern=["lightning", "softmax"], mixers={"lightning": {"heads": 2}, "softmax": {"heads": 2, "kv_heads": 1}}
    )
    config = ModelConfig(width=16, depth=2, tie_embedding=tie)
    memory = recompute if isinstance(recompute, MemoryConfig) else MemoryConfig(recompute=recompute)
    model = Decoder(config, layers, vocabulary=VOCABULARY, memory=memory)
    torch.nn.init.normal_(model.head.weight, std=0.2)  # zero at the start of a training, it would hide the rest
    return model


def engine_named(name: str) -> EngineFactory:
    """ "fsdp", "fsdp:<replicas>", "zero<stage>" or "zero<stage>:cpu" (optimizer offload)."""
    kind, _, option = name.partition(":")
    if kind == "fsdp":
        return partial(FSDPEngine, config=FSDPConfig(replicas=int(option or 1)))
    config = DeepSpeedConfig(stage=int(kind.removeprefix("zero")), offload_optimizer=option or "none")
    os.environ.setdefault("LOCAL_RANK", "0")  # train.py sets it for a process without a launcher
    return partial(DeepSpeedEngine, config=config)


def trainer_of(
    world: int,
    engine: str,
    *,
    data: int = 1,
    accumulation: int = 1,
    masks: str = "uneven",
    recompute: Any = "none",
    tile: int | None = None,
    shard_blocks: bool = True,
    optimizer: OptimizerConfig = SGD,
    config: TrainerConfig = ONE_STEP,
) -> Trainer:
    """A trainer on all ranks of a gloo group."""
    model = small_model(recompute, tile=tile)
    return Trainer(
        model,
        config=replace(config, accumulation=accumulation),
        optimizer=optimizer,
        schedule=ScheduleConfig(warmup=0, name="wsd", decay=0),
        data=GivenSequences(masks),  # type: ignore[arg-type]
        mesh=build_mesh("cpu", data=data, sequence=world // data),
        layout="zigzag",
        blocks=tuple(model.blocks) if shard_blocks else (),
        engine=engine_named(engine),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights, whole, on every rank."""
    names = (name for name in trainer.tensors().items() if name[0].startswith("model."))
    return {name.removeprefix("model."): whole(tensor) for name, tensor in names}
