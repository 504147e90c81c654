"""A trained softmax model becomes another one: which weights it keeps, what matching moves, and on how many ranks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longtrain import checkpoint
from longtrain.config import compose, source_of
from longtrain.data import build_data
from longtrain.generation import load_model
from longtrain.model import Block
from longtrain.parallel import SequenceShard
from longtrain.recipe import recipe_layers
from longtrain.train import first_trainer, next_trainer, save
from longtrain.trainer import Trainer
from tests.distributed import run_distributed
from tests.linearisation.runs import NEW, SOFTMAX, overrides, processes_of, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "softmax"
    run_distributed(1, trained, folder, timeout=240)
    return folder


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """The weights of a trainer's model, those of teachers too."""
    trainer.tensors()  # none is gathered any more
    named = trainer.model.named_parameters()
    return {name: cast(DTensor, p).full_tensor().detach().clone() for name, p in named}


def started(rank: int, world: int, name: str, given: Sequence[str], steps: int) -> list[Any]:
    """Weights before and after some steps, and the steps' losses."""
    recipe = compose(f"linearise_{name}", [f"launch.processes={world}", *given])
    training, _ = build_data(recipe.data, seed=recipe.seed)
    processes = processes_of(recipe, rank, world)
    trainer, losses = first_trainer(recipe, processes, training), []
    before = whole(trainer)
    for _ in range(steps):
        losses.append(trainer.train_step().loss)
        trainer = next_trainer(recipe, processes, training, trainer)
    after = whole(trainer)
    trainer.close()
    return [before, after, losses]


def weights_of(run: Path) -> dict[str, Tensor]:
    folder = checkpoint.latest(run)
    assert folder is not None
    found = checkpoint.read_tensors(folder, prefix="model.")
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


@pytest.mark.parametrize("name", NEW)
def test_what_softmax_has_is_taken_to_the_bit(name: str, run: Path) -> None:
    before, _, _ = run_distributed(1, started, name, overrides(name, run), 0)[0]
    for key, tensor in weights_of(run).items():
        assert torch.equal(before[key], tensor), key
        if ".mixer." in key:
            assert torch.equal(before[key.replace(".mixer.", ".teacher.")], tensor), key
    assert {key.split(".mixer.")[1] for key in weights_of(run) if ".mixer." in key} == {"qkv.weight", "out.weight"}


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_matching_moves_the_new_mixers_and_nothing_else(name: str, optimizer: str, run: Path) -> None:
    given = overrides(name, run, *SOFTMAX, f"layers.pattern=[{name}, softmax]", f"optimizer.name={optimizer}")
    before, after, _ = run_distributed(1, started, name, given, 2)[0]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if key.startswith("blocks.0.mixer.")}
    assert not any(".teacher." in key for key in before if key.startswith("blocks.1."))


@pytest.mark.parametrize("name", NEW)
def test_the_loss_is_the_mean_squared_error_under_the_trained_models_inputs(name: str, run: Path) -> None:
    given = overrides(name, run, "trainer.clip=.inf")
    before, _, losses = run_distributed(1, started, name, given, 1)[0]
    old, _ = load_model(run)
    recipe = compose(f"linearise_{name}", given)
    training, _ = build_data(recipe.data, seed=recipe.seed)
    sequence = training.sequence(0)
    shard = SequenceShard(length=256, cu_seqlens=sequence.cu_seqlens)
    errors = []
    with torch.no_grad():
        x = old.embedding(torch.from_numpy(sequence.tokens)[None])
        for number, layer in enumerate(recipe_layers(recipe)):
            block, new = cast(Block, old.blocks[number]), layer.mixer(layer.options, layer.place)
            start = f"blocks.{number}.mixer."
            new.load_state_dict({key.removeprefix(start): t for key, t in before.items() if key.startswith(start)})
            normed = block.mixer_norm(x)
            errors.append((new(normed, shard) - block.mixer(normed, shard)).square().mean())
            x = block(x, shard)
    assert losses[0] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)


SPREADS = [
    (2, ["memory.shard_blocks=true", "parallel.layout=contiguous"]),
    (2, ["memory.recompute=attention", "memory.shard_blocks=true"]),
    (2, ["parallel.data=2", "trainer.sequences=2"]),
    (1, ["memory.recompute=full", "trainer.accumulation=2", "trainer.sequences=2"]),
]


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize(("world", "spread"), SPREADS)
def test_losses_of_both_stages_are_the_same_on_any_number_of_ranks(
    name: str, world: int, spread: list[str], run: Path
) -> None:
    common = [word for word in spread if word.startswith("trainer.sequences")]
    _, weights, expected = run_distributed(1, started, name, overrides(name, run, *common), 6)[0]
    assert not any(".teacher." in key for key in weights)
    for _, _, losses in run_distributed(world, started, name, overrides(name, run, *spread), 6):
        np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=0)
    assert max(expected[:3]) < 1 < min(expected[3:])  # squares of small numbers, then nats per byte


def test_the_second_stage_has_the_schedule_of_its_own_steps(run: Path) -> None:
    peak = 0.004
    changes = ["schedule.warmup=2", "linearise.match_rate=0.5", f"optimizer.learning_rate={peak}"]
    rates = run_distributed(1, rates_of, overrides("gsa", run, *changes))[0]
    assert rates[0] == pytest.approx(peak / 4) and rates[1] == pytest.approx(peak / 2)
    assert rates[3] == pytest.approx(peak / 2) and rates[4] == pytest.approx(peak)
    assert rates[2] == pytest.approx(peak / 2 * 0.02) and rates[5] == pytest.approx(peak * 0.02)


def rates_of(rank: int, world: int, given: Sequence[str]) -> list[float]:
    recipe = compose("linearise_gsa", ["launch.processes=1", *given])
    training, _ = build_data(recipe.data, seed=recipe.seed)
    processes = processes_of(recipe, rank, world)
    trainer, rates = first_trainer(recipe, processes, training), []
    for _ in range(6):
        rates.append(trainer.train_step().learning_rate)
        trainer = next_trainer(recipe, processes, training, trainer)
    trainer.close()
    return rates


def test_a_checkpoint_of_matching_is_one_of_the_model_alone(run: Path, tmp_path: Path) -> None:
    names = run_distributed(1, saved, overrides("lizard", run), tmp_path)[0]
    assert names and not any("teacher" in name for name in names)


def saved(rank: int, world: int, given: Sequence[str], folder: Path) -> list[str]:
    recipe = compose("linearise_lizard", ["launch.processes=1", *given])
    training, _ = build_data(recipe.data, seed=recipe.seed)
    trainer = first_trainer(recipe, processes_of(recipe, rank, world), training)
    trainer.train_step()
    save(trainer, folder, recipe, 0.0)
    trainer.close()
    found = checkpoint.latest(folder)
    assert found is not None
    return list(checkpoint.read_tensors(found))


def test_a_model_can_start_from_a_run_without_matching(run: Path) -> None:
    given = overrides("gsa", run, "linearise.match_steps=0", *SOFTMAX)
    before, _, losses = run_distributed(1, started, "gsa", given, 1)[0]
    assert all(torch.equal(before[key], tensor) for key, tensor in weights_of(run).items())
    assert source_of(compose("linearise_gsa", given)) is not None
    assert losses[0] > 1  # nats
