"""One rank of `longtrain bench training --devices`: steps of a recipe's own trainer, timed, and what it waited.

The first rank writes what all of them found as one JSON object into a file.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from longtrain.config import compose
from longtrain.data import build_data
from longtrain.errors import UsageError, leave, report_failure
from longtrain.recipe import Recipe
from longtrain.train import Processes, build_trainer, everywhere, joined, peak_memory


@dataclass
class Waited:
    """Seconds in which this process stood still until a message had come, and how many it waited for."""

    seconds: float = 0.0
    messages: int = 0


@contextmanager
def waits() -> Iterator[Waited]:
    """Count the time inside every wait for a message: the sequence's, the gradients', the sharded weights'.

    Of a CPU's messages: on an accelerator streams wait, not this process.
    """
    work_class: Any = dist.Work
    waited, wait = Waited(), work_class.wait

    def _timed(work: dist.Work, *timeout: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return wait(work, *timeout, **named)
        finally:
            waited.seconds += time.perf_counter() - start
            waited.messages += 1

    work_class.wait = _timed
    try:
        yield waited
    finally:
        work_class.wait = wait


def measure(recipe: Recipe, processes: Processes, warm_up: int) -> dict[str, Any]:
    """Train for `trainer.steps`, the first `warm_up` untimed.

    Returns losses of all steps; seconds and tokens of the timed ones; memory_bytes, the most that one rank held;
    waiting, the mean share of the timed seconds in which a rank waited (None on accelerators).
    """
    training, _ = everywhere(lambda: build_data(recipe.data, seed=recipe.seed))
    trainer = build_trainer(recipe, processes, training)
    losses, seconds, tokens = [], 0.0, 0
    with waits() as waited:
        for step in range(recipe.trainer.steps):
            if step == warm_up:
                waited.seconds = 0.0
            result = trainer.train_step()
            losses.append(result.loss)
            if step >= warm_up:
                seconds += result.seconds
                tokens += result.tokens
    trainer.close()
    found: list[Any] = [None] * processes.world
    dist.all_gather_object(found, (seconds, waited.seconds, peak_memory(processes.device)))
    slowest = max(seconds for seconds, _, _ in found)
    shares = [waited / seconds for seconds, waited, _ in found]
    return {
        "losses": losses,
        "seconds": slowest,
        "tokens": tokens,
        "memory_bytes": max(memory for _, _, memory in found),
        "waiting": sum(shares) / len(shares) if processes.device.type == "cpu" else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.bench_training", description="A rank, timed.")
    parser.add_argument("--config-name", required=True, metavar="RECIPE")
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        recipe = compose(arguments.config_name, arguments.overrides)
        with joined(recipe) as processes:
            found = measure(recipe, processes, arguments.warm_up)
            if processes.first:
                arguments.output.write_text(json.dumps(found), encoding="utf-8")
            dist.barrier()
    except Exception as error:
        return report_failure(error, environment=os.environ, on_all_ranks=isinstance(error, UsageError))
    return 0


if __name__ == "__main__":
    leave(main())
