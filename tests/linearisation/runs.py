"""A small trained run of softmax layers, and recipes that make it one of others."""

from collections.abc import Sequence
from pathlib import Path

import torch

from longtrain.config import compose, to_yaml
from longtrain.data import build_data
from longtrain.parallel import build_mesh
from longtrain.recipe import Recipe, degrees
from longtrain.run_folder import create, write_config
from longtrain.train import Processes, build_trainer, save

TEXT = Path(__file__).resolve().parents[2] / "longtrain" / "layers"  # few files: read in a moment
SMALL = [
    "data=text",
    f"data.path={TEXT}",
    "data.length=256",
    "model.width=32",
    "model.depth=2",
    "model.mlp_width=64",
    "trainer.evaluate_sequences=1",
    "trainer.steps=6",
]
SOFTMAX = ["layers.pattern=softmax", "layers.mixers.softmax.heads=4", "layers.mixers.softmax.kv_heads=2"]
NEW = {
    "gsa": [f"layers.mixers.gsa.{option}" for option in ("heads=4", "kv_heads=2", "slots=8")],
    "lizard": [f"layers.mixers.lizard.{option}" for option in ("heads=4", "kv_heads=2", "window=16")],
}


def overrides(name: str, run: Path, *more: str) -> list[str]:
    """What makes `linearise_<name>` a small recipe of three steps of each stage, from a run."""
    return [*SMALL, *NEW[name], f"layers.pattern={name}", f"linearise.from={run}", "linearise.match_steps=3", *more]


def processes_of(recipe: Recipe, rank: int, world: int) -> Processes:
    data, sequence = degrees(recipe, world)
    return Processes(rank, world, build_mesh("cpu", data=data, sequence=sequence), torch.device("cpu"))


def settings(folder: Path, more: Sequence[str] = ()) -> Recipe:
    """Make a run's folder with the settings of a small softmax model, and nothing else."""
    recipe = compose("quickstart", [*SMALL, *SOFTMAX, "launch.processes=1", *more])
    create(folder)
    write_config(folder, to_yaml(recipe))
    return recipe


def trained(rank: int, world: int, folder: Path) -> None:
    """Train such a model for two steps, and keep it as a run's folder."""
    recipe = settings(folder)
    training, _ = build_data(recipe.data, seed=recipe.seed)
    trainer = build_trainer(recipe, processes_of(recipe, rank, world), training)
    for _ in range(2):
        trainer.train_step()
    save(trainer, folder, recipe, 0.0)
    trainer.close()
