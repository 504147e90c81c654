"""Starting a dry run: a process in which one rank's training step runs on pretended devices (`longtrain.dry_run`)."""

import json
from collections.abc import Sequence

from longtrain.dry_run import Held
from longtrain.dry_run.process import printed


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

    architecture: whose kernels' workspace is counted, one of `longtrain.kernels.launching.ARCHITECTURES`; None: CPUs.
    real: no pretence: this machine's CPU, with real numbers, in a world of one. timeout: seconds.

    Raises:
        UsageError: the recipe cannot work, with the recipe's message. RuntimeError: the step failed, with its output.
    """
    words = ["--config-name", recipe, "--world", str(world), "--rank", str(rank)]
    words += ["--architecture", architecture] if architecture is not None else []
    words += ["--real"] if real else []
    return Held(**json.loads(printed("longtrain.dry_run", [*words, *overrides], what=recipe, timeout=timeout)))
