"""A packed hybrid on four ranks trains as on one, whether its softmax layer stays or moves."""

from functools import cache, partial

import numpy as np
import pytest
import torch

from longtrain.data import PackedSequence
from longtrain.layers.pattern import LayersConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.optimizer import OptimizerConfig, ScheduleConfig
from longtrain.parallel import SequenceShard, build_mesh, count_messages
from longtrain.trainer import Trainer, TrainerConfig
from tests.distributed import run_distributed

# The nine mixed documents of the balance tests, T = 16K there, at a 32nd of their lengths.
DOCUMENTS = [0, 188, 281, 359, 415, 453, 481, 500, 509, 512]
LENGTH, STEPS = DOCUMENTS[-1], 8


class Walks:
    """Sequences with the same documents, in which each token tells the next one but for a coin."""

    length = LENGTH

    def sequence(self, index: int) -> PackedSequence:
        coins = np.random.default_rng(index).integers(0, 2, LENGTH + 1)
        tokens = np.cumsum(1 + 3 * coins) % 61
        return PackedSequence(tokens[:-1], tokens[1:], np.array(DOCUMENTS))


def losses(rank: int, world: int, home: str, layout: str) -> tuple[list[float], int]:
    """The loss of each step, and how many all-to-alls the first one took."""
    torch.manual_seed(6)
    softmax = {"heads": 4, "kv_heads": 2, "layout": layout, "strategy": "ring"}
    layers = LayersConfig(
        pattern=["lightning", "lightning", "softmax", "lightning"],
        mixers={"lightning": {"heads": 4}, "softmax": softmax},
    )
    model = Decoder(ModelConfig(width=32, depth=4, tie_embedding=False), layers, vocabulary=61)
    trainer = Trainer(
        model,
        config=TrainerConfig(steps=STEPS, sequences=1),
        optimizer=OptimizerConfig(name="sgd", learning_rate=4.0, weight_decay=0.0),
        schedule=ScheduleConfig(warmup=0, name="wsd", decay=0),
        data=Walks(),  # type: ignore[arg-type]
        mesh=build_mesh("cpu", data=1, sequence=world),
        layout=home,
        prepare=partial(model.prepare, device=torch.device("cpu"), dtype=torch.float32),
    )
    with count_messages() as counter:
        found = [trainer.train_step().loss]
        exchanges = counter.count("all_to_all")
    found += [trainer.train_step().loss for _ in range(STEPS - 1)]
    trainer.close()
    return found, exchanges


@cache
def alone() -> list[float]:
    return run_distributed(1, losses, "contiguous", "home")[0][0]


@pytest.mark.parametrize("layout", ["home", "balanced", "auto"])
@pytest.mark.parametrize("home", ["zigzag", "contiguous"])
def test_a_packed_hybrid_trains_as_on_one_rank(home: str, layout: str) -> None:
    assert alone()[-1] < alone()[0] - 0.05  # it learns something that a wrong gradient would spoil
    for found, exchanges in run_distributed(4, losses, home, layout):
        assert found == pytest.approx(alone(), rel=1e-5)
        if layout != "auto":
            assert exchanges == (4 if layout == "balanced" else 0)


def test_the_loader_prepares_what_the_layer_needs() -> None:
    shard = SequenceShard.pretend(LENGTH, rank=0, world=4, layout="zigzag", cu_seqlens=DOCUMENTS)
    layers = LayersConfig(pattern=["softmax"], mixers={"softmax": {"heads": 4, "layout": "balanced"}})
    model = Decoder(ModelConfig(width=32, depth=1), layers, vocabulary=61)
    model.prepare(shard, device=torch.device("cpu"), dtype=torch.float32)
    assert shard.with_layout("balanced").plans
