"""`longtrain train`: what starts a recipe's ranks, by launch.launcher, and what `--print` shows of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from longtrain import run_folder
from longtrain.config import quoted_override
from longtrain.launch import deepspeed, hosts, local, slurm, torchrun
from longtrain.recipe import degrees

if TYPE_CHECKING:
    from longtrain.recipe import Recipe


def start(recipe: "Recipe", name: str, overrides: Sequence[str], *, show: bool) -> int:
    """Start the recipe `name`, composed with `overrides`; the exit code. show: print what would run and start nothing.

    Raises:
        UsageError: the launcher cannot start it as the recipe says.
    """
    launcher, words = recipe.launch.launcher, ["--config-name", name, *overrides]
    if launcher == "local":
        return _local(recipe, words, show=show)
    nodes = slurm.find_nodes(recipe) if launcher == "slurm" else hosts.find_nodes(recipe)
    degrees(recipe, nodes.world)  # refuses what does not fit these processes before they start
    if launcher == "slurm":
        text = slurm.sbatch_file(recipe, nodes, words)
        return _print(text.rstrip("\n")) if show else slurm.submit(text)
    command = {"torchrun": torchrun, "deepspeed": deepspeed}[launcher].command(recipe, nodes, words)
    return _print(command.text()) if show else command.become()


def _local(recipe: "Recipe", words: list[str], *, show: bool) -> int:
    processes = local.processes_for(recipe)
    degrees(recipe, processes)
    if recipe.resume is not None:
        run_dir = run_folder.open_existing(Path(recipe.resume))
    else:
        run_dir = run_folder.default_name(recipe.recipe) if recipe.run_dir is None else Path(recipe.run_dir)
        words.append(quoted_override("run_dir", str(run_dir)))
    command = local.train_command(words)
    if not show:
        return local.run_ranks(command, processes=processes, logs=run_dir / "logs")
    told = hosts.Command(tuple(command), hosts.variables(hosts.Nodes(1, processes)))
    return _print(f"# {processes} processes, with RANK and LOCAL_RANK 0 to {processes - 1}\n{told.text()}")


def _print(text: str) -> int:
    print(text)
    return 0
