"""The error that is the user's to mend, how a failing rank tells its launcher what went wrong, and how a rank ends."""

import atexit
import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

FAILURE_FOLDER = "LONGTRAIN_FAILURE_FOLDER"  # environment variable of a rank: where its launcher looks for its failure
RANK_0_SPEAKS = 10.0  # seconds that the other ranks leave rank 0 to say what is wrong with all of them
TRACEBACK = "LONGTRAIN_TRACEBACK"  # environment variable: 1 shows the traceback of a user's error too


class UsageError(Exception):
    """What a user did wrong, in one line that says what was given and what would work.

    Raised at the level of recipes, files and commands. Library calls with wrong arguments raise `ValueError`.
    """

    def __init__(self, message: str):
        # One line on the screen whatever the cause was: causes from elsewhere (YAML, the file system) may hold several.
        super().__init__(" ".join(message.split()))


def nearest(name: str, names: Iterable[str]) -> str:
    """`` (nearest: 'x')`` for the known name that looks most like ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (nearest: {close[0]!r})" if close else ""


@dataclass(frozen=True)
class Failure:
    """Why one rank ended: the record that it leaves for its launcher."""

    rank: int
    pid: int
    time: float  # seconds since the epoch, when the error reached the rank's entry point
    exit_code: int
    text: str  # what the user should see


def exit_code_of(error: BaseException) -> int:
    """2 for what the user can mend, 1 for everything else."""
    return 2 if isinstance(error, UsageError) else 1


def text_of(error: BaseException, *, environment: Mapping[str, str]) -> str:
    """What to show for an error: one line for a `UsageError` (unless LONGTRAIN_TRACEBACK=1), else its traceback."""
    if isinstance(error, UsageError) and environment.get(TRACEBACK) != "1":
        return f"longtrain: {error}\n"
    return "".join(traceback.format_exception(error))


def report_failure(error: BaseException, *, environment: Mapping[str, str], on_all_ranks: bool = False) -> int:
    """Report what ended this rank; returns the exit code to leave with.

    Under `longtrain train` the report goes to the launcher, which shows the failure that came first, once, and this
    rank's log. Under other launchers it goes to stderr.

    Args:
        environment: `os.environ` of the rank.
        on_all_ranks: every rank fails with this same error (a wrong recipe), so only rank 0 prints it.
    """
    rank = int(environment.get("RANK", "0"))
    text = text_of(error, environment=environment)
    folder = environment.get(FAILURE_FOLDER)
    if folder is not None:
        _write(Path(folder), Failure(rank, os.getpid(), time.time(), exit_code_of(error), text))
    # Rank 0's stderr is the user's screen, where the launcher shows the failure; that of the others is their log.
    launcher_prints = folder is not None and rank == 0
    if not launcher_prints and (rank == 0 or folder is not None or not on_all_ranks):
        print(text, end="", file=sys.stderr, flush=True)
    elif not launcher_prints:
        # Rank 0 says it. Launchers stop all ranks as soon as one has left, so let it be the first to leave.
        time.sleep(RANK_0_SPEAKS)
    return exit_code_of(error)


def leave(exit_code: int) -> NoReturn:
    """End a rank: run its exit handlers and write out what it printed, but skip the interpreter's own shutdown.

    During that shutdown threads of the communication libraries may still be at work, and a rank that had done all it
    should then ends with SIGABRT ("terminate called without an active exception"; seen once in some fifty runs on a
    busy machine).
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def read_failure(folder: Path, rank: int) -> Failure | None:
    """The failure that a rank reported, or None."""
    path = _record(folder, rank)
    return Failure(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _write(folder: Path, failure: Failure) -> None:
    path = _record(folder, failure.rank)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    unfinished.replace(path)  # the launcher never reads half a record


def _record(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"
