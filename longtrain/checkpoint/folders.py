"""The checkpoints of a run: which there are, which go, and what a killed process left behind."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(writing|removing)")


def step_folder(run_dir: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:08d}"


def latest(run_dir: Path) -> Path | None:
    """Find the checkpoint with the highest step; None if the run has none. `load` tells whether it is whole."""
    return max(_checkpoints(run_dir), key=_step_of, default=None)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, and what killed processes left. One rank calls it, between saves."""
    if keep < 1:
        raise ValueError(f"keep: got {keep}, expected at least 1")
    _remove_leftovers(run_dir / "checkpoints")
    for folder in sorted(_checkpoints(run_dir), key=_step_of)[:-keep]:
        # Under its own name a folder is whole; it loses the name before it loses files.
        doomed = folder.with_name(f".{folder.name}.removing")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _checkpoints(run_dir: Path) -> list[Path]:
    parent = run_dir / "checkpoints"
    return [path for path in parent.iterdir() if _STEP.fullmatch(path.name)] if parent.is_dir() else []


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _remove_leftovers(parent: Path) -> None:
    """Remove half-written and half-removed checkpoints: no save may be under way."""
    for path in parent.iterdir() if parent.is_dir() else []:
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path)
