"""`longtrain eval`: the held-out loss of a run's newest checkpoint, started like the training entry."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from longtrain import plots
from longtrain.config import read_run
from longtrain.data import build_data
from longtrain.errors import UsageError, leave, report_failure
from longtrain.recipe import Recipe
from longtrain.train import Processes, build_trainer, everywhere, held_out_record, joined, restore
from longtrain.trainer import Evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """Run one process of an evaluation; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.evaluation", description="Held-out loss of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--sequences", type=int, help="held-out sequences; default: the recipe's")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="added by deepspeed's launcher; not needed")
    arguments = parser.parse_args(argv)
    try:
        recipe = read_run(arguments.run)
        sequences = recipe.trainer.evaluate_sequences if arguments.sequences is None else arguments.sequences
        if sequences < 1:
            raise UsageError(f"--sequences: got {sequences}, expected 1 or more")
        with joined(recipe) as processes:
            evaluation, step = evaluate(recipe, processes, arguments.run, sequences)
            if processes.first:
                _report(arguments.run, evaluation, step)
    except Exception as error:
        return report_failure(error, environment=os.environ, on_all_ranks=isinstance(error, UsageError))
    return 0


def evaluate(recipe: Recipe, processes: Processes, run_dir: Path, sequences: int) -> tuple[Evaluation, int]:
    """Evaluate the newest checkpoint; returns the evaluation and the checkpoint's step."""
    training, held_out = everywhere(lambda: build_data(recipe.data, seed=recipe.seed))
    trainer = build_trainer(recipe, processes, training, restored=True)
    everywhere(lambda: restore(trainer, run_dir))
    return trainer.evaluate(held_out, sequences), trainer.step


def _report(run_dir: Path, evaluation: Evaluation, step: int) -> None:
    picture = run_dir / "loss_by_position.png"
    plots.plot_loss_by_position(*evaluation.by_position(), picture)
    result = {"step": step, "tokens": int(evaluation.counts.sum())} | held_out_record(evaluation)
    (run_dir / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    print(
        f"step {step}: held-out loss {evaluation.loss:.4f} nats per token, accuracy {100 * evaluation.accuracy:.2f} %, "
        f"{result['tokens']:,} tokens"
    )
    for pairs, accuracy in evaluation.accuracy_by_group.items():
        print(f"  {pairs} pairs: accuracy {100 * accuracy:.2f} %")
    print(f"by position in the document: {picture}")


if __name__ == "__main__":
    leave(main())
