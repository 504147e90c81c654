"""The training entry that every launcher starts, once per process.

``longtrain train`` starts it on this machine; torchrun and deepspeed start it as
``torchrun --nproc_per_node 8 -m longtrain.train --config-name RECIPE key=value ...``. Environment variables (what a
launcher says about rank and world) are read here and in ``launch/``, and nowhere further in.
"""

import argparse
import dataclasses
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from longtrain import checkpoint, plots, run_folder
from longtrain.config import compose, source_of, to_yaml
from longtrain.data import Sequences, build_data
from longtrain.engines import PRECISIONS, DeepSpeedEngine, EngineFactory, FSDPEngine
from longtrain.errors import UsageError, leave, report_failure
from longtrain.initialisation import Values, shapes_and_values
from longtrain.layers.pattern import describe_layers, with_strategy
from longtrain.linearisation import (
    MATCH,
    MatchingDecoder,
    Source,
    hand_over,
    load_weights,
    matched,
    optimizer_while_matching,
    teachers,
)
from longtrain.memory import idle_offload
from longtrain.metrics import METRICS, MetricsWriter, read_metrics
from longtrain.model import Decoder
from longtrain.parallel import build_mesh
from longtrain.recipe import Recipe, degrees, recipe_layers
from longtrain.screen import Screen
from longtrain.trainer import LANGUAGE_MODEL, Evaluation, StepResult, Trainer

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world: int
    mesh: DeviceMesh  # "data" and "sequence", by build_mesh
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of a training; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.train", description="One process of a training run.")
    parser.add_argument("--config-name", required=True, metavar="RECIPE", help="name of a recipe, or a .yaml file")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="added by deepspeed's launcher; not needed")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = compose(arguments.config_name, arguments.overrides)
        with joined(recipe) as processes:
            train(recipe, processes)
    except Exception as error:
        # What the user can mend is refused on every rank alike, so one of them says it.
        return report_failure(error, environment=os.environ, on_all_ranks=isinstance(error, UsageError))
    return 0


@contextmanager
def joined(recipe: Recipe) -> Iterator[Processes]:
    """Join the process group that the launcher announced (alone: a group of one) and make the mesh."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    data, sequence = degrees(recipe, world)
    device = _device(recipe, int(os.environ.get("LOCAL_RANK", "0")))
    if recipe.engine == "deepspeed":
        _tell_deepspeed(device)
    timeout = timedelta(seconds=recipe.launch.timeout)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world == 1 and "MASTER_ADDR" not in os.environ:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (public, in torch's documentation)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    mesh = build_mesh(device.type, data=data, sequence=sequence, rows=recipe.parallel.rows)
    yield Processes(rank, world, mesh, device)
    # Not after a failure: that would wait for the other ranks before anybody is told.
    dist.destroy_process_group()


def train(recipe: Recipe, processes: Processes) -> None:
    """The whole run: data, model, steps with evaluations and checkpoints, summary and plots."""
    training, held_out = everywhere(lambda: build_data(recipe.data, seed=recipe.seed))
    trainer = first_trainer(recipe, processes, training)
    run_dir = on_first_rank(lambda: _open_run(recipe, processes))
    seconds = _resume(recipe, trainer, run_dir) if recipe.resume is not None else 0.0
    with Screen(enabled=processes.first) as screen:
        screen.start(recipe.trainer.steps, trainer.step, _headline(recipe, processes, trainer, training, run_dir))
        metrics = MetricsWriter(run_dir, resume_step=trainer.step) if processes.first else None
        evaluation: Evaluation | None = None
        while trainer.step < recipe.trainer.steps:
            result = trainer.train_step()
            seconds += result.seconds
            last = result.step == recipe.trainer.steps
            record = _record(result, processes)
            if result.step <= recipe.linearise.match_steps:
                record["objective"] = "match"
            trainer = next_trainer(recipe, processes, training, trainer)
            if last or _due(result.step, recipe.trainer.evaluate_every):
                evaluation = trainer.evaluate(held_out, recipe.trainer.evaluate_sequences)
                record |= held_out_record(evaluation)
            if metrics is not None:
                metrics.write(record)
            screen.step(record)
            if last or _due(result.step, recipe.trainer.checkpoint_every):
                save(trainer, run_dir, recipe, seconds)
        if evaluation is None:  # resumed at its end: nothing was left to train
            evaluation = trainer.evaluate(held_out, recipe.trainer.evaluate_sequences)
        summary = _summary(recipe, processes, trainer, seconds) | held_out_record(evaluation)
        if metrics is not None:
            metrics.close()
            summary |= matched(read_metrics(run_dir / METRICS), recipe.linearise.match_steps)
            _finish(run_dir, summary, evaluation, screen)
    trainer.close()
    dist.barrier()  # no rank leaves, and takes its end of the connections with it, before the run folder is whole


def build_trainer(
    recipe: Recipe,
    processes: Processes,
    training: Sequences,
    *,
    source: Source | None = None,
    matching: bool = False,
    restored: bool = False,
) -> Trainer:
    """The trainer of a recipe, on these processes; every rank makes the same weights from the seed, and keeps its part.

    source: the trained run that the recipe starts from, to start from it; matching: with its first stage. restored: a
    checkpoint will bring the weights, so none are made.
    """
    stage = recipe.linearise.match_steps
    model, values = _model(recipe, processes.device, training, source, matching=matching, weights=not restored)
    return Trainer(
        model,
        config=dataclasses.replace(recipe.trainer, steps=stage) if matching else recipe.trainer,
        optimizer=optimizer_while_matching(recipe.optimizer, recipe.linearise) if matching else recipe.optimizer,
        objective=MATCH if matching else LANGUAGE_MODEL,
        first=0 if matching else stage,
        schedule=recipe.schedule,
        data=training,
        mesh=processes.mesh,
        layout=recipe.parallel.layout,
        blocks=tuple(model.blocks) if recipe.memory.shard_blocks else (),
        prepare=partial(model.prepare, device=processes.device, dtype=PRECISIONS[recipe.trainer.precision]),
        values=values,
        engine=engine_of(recipe),
    )


def _model(
    recipe: Recipe, device: torch.device, training: Sequences, source: Source | None, *, matching: bool, weights: bool
) -> tuple[Decoder, Values | None]:
    """The model in shapes, and its values from the seed (weights or not); or whole, with those of a trained run."""
    layers = with_strategy(recipe.layers, recipe.parallel.strategy, heads_at_once=recipe.memory.attention_heads)
    sizes = {"vocabulary": recipe.model.vocabulary or training.vocabulary, "memory": recipe.memory}
    if source is None:
        return shapes_and_values(recipe.model, layers, **sizes, seed=recipe.seed, device=device, weights=weights)
    with device:
        old = teachers(source, recipe_layers(recipe)) if matching else {}
        torch.manual_seed(recipe.seed)  # making these has drawn numbers
        model = (partial(MatchingDecoder, teachers=old) if matching else Decoder)(recipe.model, layers, **sizes)
        load_weights(model, source, recipe_layers(recipe))
    return model, None


def first_trainer(recipe: Recipe, processes: Processes, training: Sequences) -> Trainer:
    """The trainer of the stage that comes next: of a run that goes on, its checkpoint says which."""
    step = 0
    if recipe.resume is not None and recipe.linearise.from_ is not None:
        step = on_first_rank(lambda: _step_of(Path(cast(str, recipe.resume))))
    matching = step < recipe.linearise.match_steps
    source = everywhere(lambda: source_of(recipe)) if matching or step == 0 else None
    return build_trainer(recipe, processes, training, source=source, matching=matching, restored=bool(recipe.resume))


def next_trainer(recipe: Recipe, processes: Processes, training: Sequences, trainer: Trainer) -> Trainer:
    """The trainer of the next step: the same, but after matching one of the same weights that has no old mixers."""
    if trainer.step != recipe.linearise.match_steps or trainer.step in (0, recipe.trainer.steps):
        return trainer
    following = build_trainer(recipe, processes, training)
    hand_over(trainer, following)
    return following


def _step_of(run_dir: Path) -> int:
    """The step of a run's newest checkpoint, 0 without one."""
    folder = checkpoint.latest(run_folder.open_existing(run_dir))
    return 0 if folder is None else int(checkpoint.read_numbers(folder)["step"])


def engine_of(recipe: Recipe) -> EngineFactory:
    """What makes the recipe's engine."""
    if recipe.engine == "deepspeed":
        return partial(DeepSpeedEngine, config=recipe.deepspeed)
    return partial(FSDPEngine, config=recipe.fsdp)


def save(trainer: Trainer, run_dir: Path, recipe: Recipe, seconds: float) -> None:
    folder = run_dir / "checkpoints" / f"step-{trainer.step:08d}"
    numbers: dict[str, Any] = trainer.numbers() | {"seconds": seconds, "data": trainer.data.fingerprint}
    checkpoint.save(folder, tensors=trainer.tensors(), numbers=numbers)
    if dist.get_rank() == 0:
        checkpoint.prune(run_dir, recipe.trainer.keep_checkpoints)


def restore(trainer: Trainer, run_dir: Path) -> float:
    """Load the newest checkpoint of a run; returns the seconds trained so far."""
    folder = checkpoint.latest(run_dir)
    if folder is None:
        raise UsageError(f"{run_dir} has no checkpoint yet; train it first")
    tensors = trainer.tensors()
    numbers = checkpoint.load(folder, into=tensors)
    if numbers["data"] != trainer.data.fingerprint:
        raise UsageError(
            f"resume: {folder} was trained on other data, another data.length or another seed; give the keys it was "
            f"started with ({run_dir / 'config.yaml'})"
        )
    if numbers["step"] > trainer.config.steps:
        steps = f"{folder} is at step {numbers['step']}; expected as many or more"
        raise UsageError(f"trainer.steps: got {trainer.config.steps}, but {steps}")
    trainer.loaded(tensors)
    trainer.restore(numbers)
    return float(numbers["seconds"])


def _device(recipe: Recipe, local_rank: int) -> torch.device:
    if recipe.launch.device == "cpu" or (recipe.launch.device == "auto" and not torch.cuda.is_available()):
        # Launchers share the cores out through OMP_NUM_THREADS; a process of its own takes what torch finds.
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UsageError(f"launch.device: process {local_rank} of this machine has no GPU, there are {count}")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _tell_deepspeed(device: torch.device) -> None:
    """Set what DeepSpeed reads from the environment, before it is imported."""
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Operators that it compiles fit one version of torch only.
    cache = Path.home() / ".cache" / "longtrain" / f"extensions-torch-{torch.__version__}"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(cache))


def _resume(recipe: Recipe, trainer: Trainer, run_dir: Path) -> float:
    """Restore a run, then keep what it goes on with as its configuration: a refusal leaves the folder as it was."""
    seconds = everywhere(lambda: restore(trainer, run_dir))
    going_on = dataclasses.replace(recipe, run_dir=str(run_dir), resume=None)
    on_first_rank(lambda: run_folder.write_config(run_dir, to_yaml(going_on)))
    return seconds


def _open_run(recipe: Recipe, processes: Processes) -> Path:
    """Make the run folder, or open the one to resume; on rank 0 only."""
    if recipe.resume is not None:
        return run_folder.open_existing(Path(recipe.resume))
    run_dir = Path(recipe.run_dir) if recipe.run_dir is not None else run_folder.default_name(recipe.recipe)
    run_folder.create(run_dir)
    run_folder.write_config(run_dir, to_yaml(dataclasses.replace(recipe, run_dir=str(run_dir))))
    run_folder.write_environment(run_dir, world_size=processes.world, device=str(processes.device))
    return run_dir


def on_first_rank(function: Callable[[], Result]) -> Result:
    """What rank 0 gets from a function, on every rank; what it refuses is refused on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UsageError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UsageError(box[1])
    return box[0]


def everywhere(function: Callable[[], Result]) -> Result:
    """What each rank gets from a function; what one rank refuses is refused on every rank, so that none waits."""
    result, refusal = None, None
    try:
        result = function()
    except UsageError as error:
        refusal = str(error)
    refusals: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(refusals, refusal)
    first = next((text for text in refusals if text is not None), None)
    if first is not None:
        raise UsageError(first)
    return cast(Result, result)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _record(result: StepResult, processes: Processes) -> dict[str, Any]:
    rate = result.tokens / result.seconds
    return {
        "step": result.step,
        "loss": result.loss,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / processes.world,
        "learning_rate": result.learning_rate,
        "gradient_norm": result.gradient_norm,
        "memory_bytes": peak_memory(processes.device),
        **result.measures,
    }


def peak_memory(device: torch.device) -> int:
    """Most memory this process has held so far, in bytes: of the GPU's, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _headline(recipe: Recipe, processes: Processes, trainer: Trainer, training: Sequences, run_dir: Path) -> list[str]:
    mesh = processes.mesh
    layers = describe_layers(recipe.layers, recipe.model.depth)
    idle_weights = recipe.engine == "fsdp" and recipe.fsdp.cpu_offload and processes.device.type == "cpu"
    idle_memory = idle_offload(recipe.memory, processes.device)
    return [
        f"{recipe.recipe}: {trainer.parameters:,} weights, layers {layers}",
        f"{processes.world} x {processes.device.type}: data {mesh['data'].size()} x sequence {mesh['sequence'].size()}"
        f", T = {recipe.data.length:,}, layout {recipe.parallel.layout}",
        f"training data: {training.describe()}",
        *(["fsdp.cpu_offload changes nothing here: on a CPU all weights lie in host memory"] if idle_weights else []),
        *([idle_memory] if idle_memory else []),
        f"run folder: {run_dir}",
    ]


def held_out_record(evaluation: Evaluation) -> dict[str, Any]:
    """What an evaluation says, for metrics and summary."""
    record: dict[str, Any] = {"held_out_loss": evaluation.loss, "held_out_accuracy": evaluation.accuracy}
    if evaluation.accuracy_by_group:
        record["held_out_accuracy_by_pairs"] = evaluation.accuracy_by_group
    return record


def _summary(recipe: Recipe, processes: Processes, trainer: Trainer, seconds: float) -> dict[str, Any]:
    peak = torch.tensor(peak_memory(processes.device), dtype=torch.int64, device=processes.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    tokens = trainer.position * recipe.data.length
    return {
        "recipe": recipe.recipe,
        "train_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "peak_memory_bytes": int(peak),
        "world_size": processes.world,
        "sequence_degree": processes.mesh["sequence"].size(),
        "data_degree": processes.mesh["data"].size(),
        "steps": trainer.step,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _finish(run_dir: Path, summary: dict[str, Any], evaluation: Evaluation, screen: Screen) -> None:
    run_folder.write_summary(run_dir, summary)
    pictures = [run_dir / "loss.png", run_dir / "loss_by_position.png"]
    plots.plot_loss(run_dir / "metrics.jsonl", pictures[0])
    plots.plot_loss_by_position(*evaluation.by_position(), pictures[1])
    if evaluation.accuracy_by_group:
        pictures.append(run_dir / "accuracy_by_pairs.png")
        plots.plot_accuracy_by_pairs({summary["recipe"]: evaluation.accuracy_by_group}, pictures[-1])
    screen.finish(summary, [run_dir / "summary.json", *pictures])


if __name__ == "__main__":
    leave(main())
