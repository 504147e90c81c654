"""Processes of dry runs, one each: an error inside a backward pass on a pretended device ends its process."""

import os
import subprocess
import sys
from collections.abc import Sequence

from longtrain.errors import UsageError

_RANK_SAID_BY = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def printed(module: str, words: Sequence[str], *, what: str, timeout: float) -> str:
    """The last line that ``python -m module words`` prints.

    what: what its failure is called. timeout: seconds.

    Raises:
        UsageError: what the user can mend, as the process says it. RuntimeError: it failed, with its output.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _RANK_SAID_BY}
    environment |= {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}  # nothing may touch a card
    environment["LOCAL_RANK"] = "0"  # DeepSpeed insists on it
    command = [sys.executable, "-m", module, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if ended.returncode == 2:
        raise UsageError(ended.stderr.strip().splitlines()[-1].removeprefix("longtrain: "))
    if ended.returncode:
        raise RuntimeError(f"the dry run of {what} ended with exit code {ended.returncode}:\n{ended.stderr[-4000:]}")
    return ended.stdout.splitlines()[-1]
