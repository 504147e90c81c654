"""`longtrain bench recall`: the three recall recipes one after the other, and their accuracy in one picture."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtrain.errors import UsageError

RECIPES = ("recall_linear", "recall_hybrid", "recall_softmax")
PICTURE = "accuracy_by_pairs.png"


def run(overrides: Sequence[str], *, output: Path | None) -> int:
    """Train all three into folders below one and compare; 0, or the exit code of the first that failed.

    overrides: keys of all three recipes. output: a new or empty folder; None: runs/recall-<time>.

    Raises:
        UsageError: the recipes, so changed, cannot work, or the folder is not empty.
    """
    from longtrain import plots, run_folder
    from longtrain.config import compose, quoted_override

    for name in RECIPES:
        recipe = compose(name, overrides)
        if recipe.data.source != "mqar":
            raise UsageError(f"data: got {recipe.data.source}, expected mqar: what is drawn is accuracy by pairs")
        if recipe.resume is not None or recipe.run_dir is not None:
            raise UsageError("run_dir, resume: got one of them, expected --output FOLDER, for a new run of each recipe")
    folder = run_folder.default_name("recall") if output is None else output
    run_folder.create(folder)
    summaries = {}
    for name in RECIPES:
        run_dir = folder / name
        words = [sys.executable, "-m", "longtrain", "train", name, *overrides]
        ended = subprocess.run(
            [*words, quoted_override("run_dir", str(run_dir))], env={**os.environ, "PYTHONSAFEPATH": "1"}
        )
        if ended.returncode:
            return ended.returncode
        summaries[name] = run_folder.read_summary(run_dir)
    curves = {name: _curve(summary) for name, summary in summaries.items()}
    plots.plot_accuracy_by_pairs(curves, folder / PICTURE)
    print(table(curves, {name: summary["train_seconds"] for name, summary in summaries.items()}))
    print(f"  {folder / PICTURE}")
    return 0


def table(curves: dict[str, dict[int, float]], seconds: dict[str, float]) -> str:
    """Accuracy of each recipe by number of pairs, in per cent, as lines of text; seconds of training."""
    pairs = sorted({count for curve in curves.values() for count in curve})
    lines = [f"{'right, %, by pairs':<20}" + "".join(f"{count:>8,}" for count in pairs) + f"{'training':>12}"]
    for name, curve in curves.items():
        shares = (f"{100 * curve[count]:>8.2f}" if count in curve else f"{'-':>8}" for count in pairs)
        took = time.strftime("%M:%S" if seconds[name] < 3600 else "%H:%M:%S", time.gmtime(seconds[name]))
        lines.append(f"{name:<20}" + "".join(shares) + f"{took:>12}")
    return "\n".join(lines)


def _curve(summary: dict[str, Any]) -> dict[int, float]:
    return {int(count): share for count, share in summary["held_out_accuracy_by_pairs"].items()}
