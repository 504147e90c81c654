"""The yardstick of `longtrain bench training`: a recipe's model and batches in a plain PyTorch loop, in one process.

No process group, no sharded weights, no trainer: the loop that one writes first. Prints one line of JSON.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.config import compose
from longtrain.data import IGNORE, Sequences, build_data
from longtrain.errors import report_failure
from longtrain.model import Decoder
from longtrain.optimizer import Optimizers, learning_rate_factor
from longtrain.parallel import SequenceShard
from longtrain.recipe import Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loop for some steps of a recipe; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.bare_loop", description="A recipe without longtrain.")
    parser.add_argument("--config-name", required=True, metavar="RECIPE", help="name of a recipe, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    try:
        print(json.dumps(run(compose(arguments.config_name, arguments.overrides))))
    except Exception as error:
        return report_failure(error, environment=os.environ)
    return 0


def run(recipe: Recipe) -> dict[str, Any]:
    """Train for `trainer.steps`; returns losses and seconds of each step, tokens of a step, and threads."""
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.launch.device != "cpu" else "cpu")
    data, _ = build_data(recipe.data, seed=recipe.seed)
    torch.manual_seed(recipe.seed)
    with device:
        model = Decoder(
            recipe.model, recipe.layers, vocabulary=recipe.model.vocabulary or data.vocabulary, memory=recipe.memory
        )
    optimizers = Optimizers(recipe.optimizer, model)
    losses, seconds = [], []
    for step in range(1, recipe.trainer.steps + 1):
        start = time.perf_counter()
        parts = [batch(data, indices, device) for indices in step_indices(recipe, step)]
        valid = max(sum(int((labels != IGNORE).sum()) for _, labels, _ in parts), 1)
        total = 0.0
        for tokens, labels, shard in parts:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.trainer.precision == "bfloat16"):
                loss = model(tokens, shard, labels).sum() / valid
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), recipe.trainer.clip)
        optimizers.step(learning_rate_factor(recipe.schedule, step, recipe.trainer.steps))
        losses.append(total)
        seconds.append(time.perf_counter() - start)
    tokens_per_step = recipe.trainer.sequences * recipe.data.length
    return {"losses": losses, "seconds": seconds, "tokens": tokens_per_step, "threads": torch.get_num_threads()}


def step_indices(recipe: Recipe, step: int) -> list[list[int]]:
    """The sequences of each micro-batch of a step (from 1)."""
    each = recipe.trainer.sequences // recipe.trainer.accumulation
    first = (step - 1) * recipe.trainer.sequences
    return [list(range(first + n * each, first + (n + 1) * each)) for n in range(recipe.trainer.accumulation)]


def batch(data: Sequences, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor, SequenceShard]:
    """Tokens and labels `[1, T]` of sequences end to end, and the shard of one process that knows their documents."""
    packed = [data.sequence(index) for index in indices]
    tokens = torch.from_numpy(np.concatenate([sequence.tokens for sequence in packed]))[None]
    labels = torch.from_numpy(np.concatenate([sequence.labels for sequence in packed]))[None]
    starts = [sequence.cu_seqlens[:-1] + n * data.length for n, sequence in enumerate(packed)]
    documents = torch.from_numpy(np.concatenate([*starts, [tokens.shape[1]]]))
    shard = SequenceShard(length=tokens.shape[1], group=None, layout="contiguous", cu_seqlens=documents)
    return tokens.to(device), labels.to(device), shard


if __name__ == "__main__":
    sys.exit(main())
