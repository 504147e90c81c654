"""`longtrain bench training`: a recipe's own run beside a bare PyTorch loop of the same model and batches.

Both train the recipe for some steps, in turn and several times; the first steps of each are not counted, and the best
of each is compared. Before any number is shown, both must have had the same losses.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longtrain.errors import UsageError
from longtrain.launch.local import KEEP_MEMORY, cores, processes_for

if TYPE_CHECKING:
    from longtrain.recipe import Recipe

LOSS_TOLERANCE = 1e-3  # relative: the two sum float32 numbers in different orders, and some steps of training widen it
LOSS_TOLERANCE_BFLOAT16 = 3e-2


@dataclass(frozen=True)
class Measurement:
    """One training of one side."""

    losses: list[float]  # of every step, nats per token
    tokens_per_second: float  # over the steps after the warm-up


def run(recipe_name: str, overrides: Sequence[str], *, repeats: int, steps: int, warm_up: int) -> int:
    """Measure and print; 0, or 1 when the two trainings differ.

    Args:
        repeats: measurements of each side. steps: timed steps of each. warm_up: steps before those.

    Raises:
        UsageError: the recipe, or one of these numbers, cannot work.
    """
    from longtrain.config import compose
    from longtrain.recipe import degrees

    for name, value, least in (("repeats", repeats, 1), ("steps", steps, 1), ("warm-up", warm_up, 0)):
        if value < least:
            raise UsageError(f"--{name}: got {value}, expected {least} or more")
    cut = [f"trainer.steps={warm_up + steps}", "trainer.evaluate_every=0", "trainer.checkpoint_every=0"]
    changed = [*overrides, *cut, "trainer.evaluate_sequences=1"]
    recipe = compose(recipe_name, changed)
    processes = processes_for(recipe)
    data, sequence = degrees(recipe, processes)
    print(_setting(recipe, data, sequence, repeats, steps, warm_up), flush=True)
    rates: dict[str, list[float]] = {"longtrain": [], "bare loop": []}
    for repeat in range(1, repeats + 1):
        ours = _run_recipe(recipe_name, changed, warm_up)
        bare = _run_bare_loop(recipe_name, changed, warm_up)
        differences = [abs(a - b) / abs(b) for a, b in zip(ours.losses, bare.losses, strict=True)]
        difference = max(differences, key=lambda x: (math.isnan(x), x))  # a plain max passes NaN over
        allowed = LOSS_TOLERANCE_BFLOAT16 if recipe.trainer.precision == "bfloat16" else LOSS_TOLERANCE
        if not difference <= allowed:
            print(f"the losses differ by {difference:.1e}, more than {allowed:.0e}: no comparison", file=sys.stderr)
            return 1
        if repeat == 1:
            print(f"losses agree to {difference:.1e}")
        for name, measured in (("longtrain", ours), ("bare loop", bare)):
            rates[name].append(measured.tokens_per_second)
            print(f"  {repeat}. {name:<10} {measured.tokens_per_second:>12,.0f} tokens/s", flush=True)
    best = {name: max(values) for name, values in rates.items()}
    print(f"best of {repeats}: longtrain {best['longtrain']:,.0f}, bare loop {best['bare loop']:,.0f} tokens/s")
    print(f"longtrain / bare loop: {best['longtrain'] / best['bare loop']:.3f}")
    return 0


def _setting(recipe: "Recipe", data: int, sequence: int, repeats: int, steps: int, warm_up: int) -> str:
    """Hardware, shapes and how it is measured."""
    from longtrain.run_folder import environment

    machine = environment()
    devices = ", ".join(machine["accelerators"]) or f"{machine['cpu']}, {cores()} cores"
    return "\n".join(
        [
            f"{recipe.recipe} on {devices}; torch {machine['torch']}",
            f"T = {recipe.data.length}, sequences a step {recipe.trainer.sequences}, accumulation "
            f"{recipe.trainer.accumulation}, width {recipe.model.width}, depth {recipe.model.depth}, "
            f"{recipe.trainer.precision}",
            f"longtrain: data {data} x sequence {sequence}, layout {recipe.parallel.layout}; "
            "bare loop: one process with all threads",
            f"{steps} timed steps after {warm_up} of warm-up, {repeats} times each, in turn",
        ]
    )


def _run_recipe(recipe: str, overrides: Sequence[str], warm_up: int) -> Measurement:
    """The recipe's own run, as a user starts it, into a folder that is thrown away."""
    from longtrain.config import quoted_override

    with tempfile.TemporaryDirectory(prefix="longtrain-bench-") as folder:
        run_dir = Path(folder) / "run"
        words = ["-m", "longtrain", "train", recipe, *overrides, quoted_override("run_dir", str(run_dir))]
        _run(words, {})
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    # All steps have the same number of tokens, so the harmonic mean of the rates is tokens over time.
    rates = [record["tokens_per_second"] for record in records[warm_up:]]
    return Measurement([record["loss"] for record in records], len(rates) / sum(1 / rate for rate in rates))


def _run_bare_loop(recipe: str, overrides: Sequence[str], warm_up: int) -> Measurement:
    words = ["-m", "longtrain.bare_loop", "--config-name", recipe, *overrides]
    result = json.loads(_run(words, {"OMP_NUM_THREADS": str(cores()), **KEEP_MEMORY}).splitlines()[-1])
    seconds = result["seconds"][warm_up:]
    return Measurement(result["losses"], result["tokens"] * len(seconds) / sum(seconds))


def _run(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Run this Python with some arguments; returns what it printed.

    Raises:
        UsageError, RuntimeError: the command failed; with its own words.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **variables}
    ended = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    if ended.returncode == 2:
        raise UsageError(ended.stderr.removeprefix("longtrain: "))
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {ended.returncode}:\n{ended.stderr}")
    return ended.stdout
