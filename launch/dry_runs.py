"""Starting a dry run: a process in which one rank's training step runs on pretended devices (`longtrain.dry_run`)."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from longtrain.dry_run import Held
from longtrain.errors import UsageError

_RANK_SAID_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def dry_run(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    world: int,
    architecture: str | None,
    rank: int = 0,
    real: bool = False,
    timeout: float = 900.0,
) -> Held:
    """Run one step of a recipe as `rank` of `world` devices, and say what it held.

    An error inside a backward pass on a pretended device ends its process, so it gets one of its own.

    architecture: whose kernels' workspace is counted, one of `longtrain.kernels.launching.ARCHITECTURES`; None: CPUs.
    real: no pretence: this machine's CPU, with real numbers, in a world of one. timeout: seconds.

    Raises:
        UsageError: the recipe cannot work, with the recipe's message. RuntimeError: the step failed, with its output.
    """
    words = ["--config-name", recipe, "--world", str(world), "--rank", str(rank)]
    words += ["--architecture", architecture] if architecture is not None else []
    words += ["--real"] if real else []
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_SAID_BY}
    environment |= {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}  # nothing may touch a card
    command = [sys.executable, "-m", "longtrain.dry_run", *words, *overrides]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if ended.returncode == 2:
        raise UsageError(ended.stderr.strip().splitlines()[-1].removeprefix("longtrain: "))
    if ended.returncode:
        raise RuntimeError(f"the dry run of {recipe} ended with exit code {ended.returncode}:\n{ended.stderr[-4000:]}")
    return Held(**json.loads(ended.stdout.splitlines()[-1]))
