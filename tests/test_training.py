"""Training is the same however it is spread: losses of every step, and gradients of every weight."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from longtrain.config import compose
from longtrain.data import IGNORE, VOCABULARY, PackedSequence, build_data
from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.optimizer import OptimizerConfig, ScheduleConfig
from longtrain.parallel import SequenceShard, build_mesh
from longtrain.recipe import degrees
from longtrain.train import Processes, build_trainer
from longtrain.trainer import Trainer, TrainerConfig, position_buckets
from tests.distributed import run_distributed

STEPS = 20


def losses_of(rank: int, world: int, overrides: Sequence[str]) -> list[float]:
    """The losses of the quickstart's first steps, spread as the overrides say."""
    recipe = compose("quickstart", [f"launch.processes={world}", *overrides])
    data, sequence = degrees(recipe, world)
    mesh = build_mesh("cpu", data=data, sequence=sequence, rows=recipe.parallel.rows)
    processes = Processes(rank, world, mesh, torch.device("cpu"))
    training, _ = build_data(recipe.data, seed=recipe.seed)
    trainer = build_trainer(recipe, processes, training)
    return [trainer.train_step().loss for _ in range(STEPS // recipe.trainer.sequences)]


@cache
def alone(*overrides: str) -> list[float]:
    return run_distributed(1, losses_of, overrides, timeout=240)[0]


def assert_same_losses(world: int, spread: Sequence[str], *common: str) -> None:
    expected = alone(*common)
    for losses in run_distributed(world, losses_of, [*common, *spread], timeout=240):
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=0)


TWO = ("trainer.sequences=2", "data.length=1024")


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "zigzag"), (2, "contiguous"), (2, "striped"), (4, "zigzag"), (4, "striped:16")]
)
def test_quickstart_has_the_same_losses_on_any_number_of_ranks(world: int, layout: str) -> None:
    assert_same_losses(world, [f"parallel.layout={layout}"], *TWO)


@pytest.mark.full
def test_the_whole_quickstart_has_the_same_losses() -> None:
    assert_same_losses(2, [])


@pytest.mark.parametrize(
    ("world", "spread"),
    [
        (1, ["trainer.accumulation=2"]),
        (2, ["parallel.data=2"]),
        (2, ["trainer.accumulation=2"]),
        (4, ["parallel.data=2", "parallel.sequence=2"]),
        (4, ["memory.recompute=full", "memory.shard_blocks=true", "parallel.layout=contiguous"]),
        (4, ["parallel.rows=2", "parallel.layout=balanced", "parallel.strategy=ring"]),
        (2, ["parallel.strategy=ulysses", "parallel.layout=balanced"]),
    ],
)
def test_quickstart_has_the_same_losses_with_data_ranks_and_accumulation(world: int, spread: list[str]) -> None:
    assert_same_losses(world, spread, *TWO)


@pytest.mark.full
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "striped:16", "balanced"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_spread_has_the_same_losses(world: int, layout: str, accumulation: int, recompute: str) -> None:
    spread = [f"parallel.layout={layout}", f"trainer.accumulation={accumulation}", f"memory.recompute={recompute}"]
    assert_same_losses(world, spread, *TWO)


class GivenSequences:
    """Hand-made sequences in the place of packed text."""

    fingerprint = "given"

    def __init__(self, length: int, cu_seqlens: list[list[int]], masked: list[slice]) -> None:
        self.length = length
        random = np.random.default_rng(5)
        self.made = []
        for ends, mask in zip(cu_seqlens, masked, strict=True):
            tokens, labels = random.integers(0, 256, (2, length))
            labels[mask] = IGNORE
            self.made.append(PackedSequence(tokens, labels, np.array([0, *ends, length])))

    def __len__(self) -> int:
        return len(self.made)

    def sequence(self, index: int) -> PackedSequence:
        return self.made[index % len(self.made)]


# Documents end inside every rank (of 4) and at odd places; in the second sequence whole ranks have nothing to predict.
DOCUMENTS = [[5, 17, 18, 40, 61, 70, 83], [30, 31]]
MASKED = [slice(10, 12), slice(20, 97)]
LENGTH = 97


# A step this long leaves nothing of the weights' own rounding in the difference that it makes.
RATE = 1e4


def small_model(tie: bool, recompute: str | MemoryConfig = "none") -> Decoder:
    torch.manual_seed(3)
    layers = LayersConfig(
        pattern=["lightning", "softmax"], mixers={"lightning": {"heads": 2}, "softmax": {"heads": 4, "kv_heads": 2}}
    )
    config = ModelConfig(width=32, depth=4, tie_embedding=tie)
    memory = recompute if isinstance(recompute, MemoryConfig) else MemoryConfig(recompute=recompute)
    model = Decoder(config, layers, vocabulary=VOCABULARY, memory=memory)
    torch.nn.init.normal_(model.head.weight, std=0.2)  # zero at the start of a training, it would hide the rest
    return model


def gradients_of(
    rank: int, world: int, data: int, layout: str, accumulation: int, recompute: str | MemoryConfig, tie: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every weight as one SGD step shows it, on this rank."""
    model = small_model(tie, recompute)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model,
        config=TrainerConfig(steps=1, sequences=2, accumulation=accumulation, clip=float("inf")),
        optimizer=OptimizerConfig(name="sgd", learning_rate=RATE, weight_decay=0.0),
        schedule=ScheduleConfig(warmup=0, name="wsd", decay=0),
        data=GivenSequences(LENGTH, DOCUMENTS, MASKED),  # type: ignore[arg-type]
        mesh=build_mesh("cpu", data=data, sequence=world // data),
        layout=layout,
        blocks=tuple(model.blocks),
    )
    result = trainer.train_step()
    gradients = {}
    for name, weight in trainer.model.named_parameters():
        assert isinstance(weight, DTensor)
        gradients[name] = (before[name] - weight.full_tensor().detach()) / RATE
    return result.loss, gradients


@cache
def plain_gradients(tie: bool) -> tuple[float, dict[str, torch.Tensor]]:
    return run_distributed(1, gradients_of, 1, "contiguous", 1, "none", tie)[0]


@pytest.mark.parametrize(
    ("world", "data", "layout", "accumulation", "recompute", "tie"),
    [
        (1, 1, "contiguous", 2, "full", True),
        (2, 1, "contiguous", 2, "none", False),
        (2, 1, "zigzag", 1, "full", True),
        (2, 2, "striped", 1, "none", True),
        (3, 1, "zigzag", 2, "none", False),
        (4, 2, "contiguous", 1, "full", False),
        (4, 1, "striped", 2, "none", True),
        (4, 1, "contiguous", 1, "none", True),
        (4, 1, "zigzag", 2, "full", False),
    ],
)
def test_gradients_are_the_same(
    world: int, data: int, layout: str, accumulation: int, recompute: str, tie: bool
) -> None:
    loss, gradients = plain_gradients(tie)
    for spread_loss, spread in run_distributed(world, gradients_of, data, layout, accumulation, recompute, tie):
        assert spread_loss == pytest.approx(loss, rel=1e-6)
        assert spread.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (spread[name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, (name, float(error))


def test_the_loss_is_the_sum_over_valid_tokens_over_their_number() -> None:
    loss, gradients = plain_gradients(True)
    model = small_model(True)
    total, valid = torch.zeros(()), 0
    for made in GivenSequences(LENGTH, DOCUMENTS, MASKED).made:
        # Each document alone, in a model call of its own: nothing can leak from one to the other.
        for start, stop in zip(made.cu_seqlens[:-1], made.cu_seqlens[1:], strict=True):
            tokens = torch.from_numpy(made.tokens[start:stop])[None]
            labels = torch.from_numpy(made.labels[start:stop])
            logits = model(tokens, SequenceShard(length=int(stop - start)))
            total = total + torch.nn.functional.cross_entropy(logits[0], labels, ignore_index=IGNORE, reduction="sum")
            valid += int((labels != IGNORE).sum())
    (total / valid).backward()
    assert loss == pytest.approx(float(total.detach()) / valid, rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (gradients[name] - parameter.grad).norm() / parameter.grad.norm() < 1e-5, name


def all_masked(rank: int, world: int) -> tuple[float, bool]:
    torch.manual_seed(0)
    model = Decoder(ModelConfig(width=16, depth=1), LayersConfig(), vocabulary=VOCABULARY)
    trainer = Trainer(
        model,
        config=TrainerConfig(steps=1),
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(),
        data=GivenSequences(9, [[]], [slice(0, 9)]),  # type: ignore[arg-type]
        mesh=build_mesh("cpu", data=1, sequence=world),
        layout="zigzag",
    )
    result = trainer.train_step()
    return result.loss, all(bool(torch.isfinite(p.to_local()).all()) for p in trainer.model.parameters())  # type: ignore[attr-defined]


def test_a_step_without_a_single_label_changes_nothing_into_nan() -> None:
    assert run_distributed(2, all_masked) == [(0.0, True)] * 2


def evaluations(rank: int, world: int, data: int) -> list[tuple[float, list[float]]]:
    recipe = compose("quickstart", [f"launch.processes={world}", "data.length=256", "trainer.sequences=2"])
    mesh = build_mesh("cpu", data=data, sequence=world // data)
    training, held_out = build_data(recipe.data, seed=0)
    trainer = build_trainer(recipe, Processes(rank, world, mesh, torch.device("cpu")), training)
    made = [trainer.evaluate(held_out, sequences) for sequences in (1, 3)]
    return [(evaluation.loss, evaluation.counts.tolist()) for evaluation in made]


def test_evaluation_counts_every_sequence_once() -> None:
    expected = run_distributed(1, evaluations, 1)[0]
    for world, data in ((2, 2), (4, 2)):
        for found in run_distributed(world, evaluations, data):
            for (loss, counts), (wanted, wanted_counts) in zip(found, expected, strict=True):
                assert loss == pytest.approx(wanted, rel=1e-6)
                assert counts == wanted_counts
    assert [sum(counts) for _, counts in expected] == [256, 768]


def test_position_buckets_cover_every_position_once() -> None:
    for length in (1, 2, 3, 100, 4096):
        edges = position_buckets(length)
        assert edges[0] == 0 and (np.diff(edges) > 0).all() and edges[-1] < length
