"""The folder of a run: made once, refused when it is taken, and what is written into it beside metrics and checkpoints.

runs/quickstart-20260131-235959/
    config.yaml          every setting of the run
    environment.json     versions and hardware
    summary.json         how it ended
    metrics.jsonl, tensorboard/, checkpoints/, *.png
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import longtrain
from longtrain.errors import UsageError

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"

SUMMARY_KEYS = (
    "held_out_loss",
    "train_seconds",
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "world_size",
    "sequence_degree",
    "recipe",
)
"""What every summary has; held_out_loss is in nats per token."""


def default_name(recipe: str, now: datetime | None = None) -> Path:
    """Name the folder of a run that was given none: runs/<recipe>-<YYYYMMDD-HHMMSS>, in local time."""
    return Path("runs") / f"{recipe.replace('/', '-')}-{now or datetime.now():%Y%m%d-%H%M%S}"


def create(run_dir: Path) -> None:
    """Make the folder of a new run. One process calls it.

    Raises `UsageError`, and leaves nothing behind, when something is there already or the place is not writable.
    An empty folder is taken.
    """
    run_dir = Path(run_dir)
    probe = run_dir / ".writable"
    made: list[Path] = []
    try:
        for folder in [*reversed(run_dir.parents), run_dir]:
            if not folder.exists():
                folder.mkdir(exist_ok=folder != run_dir)
                made.append(folder)
        if not run_dir.is_dir():
            raise UsageError(f"run_dir={run_dir} is a file; choose another folder")
        if any(run_dir.iterdir()):
            hint = f"; to go on with that run, resume={run_dir}" if (run_dir / CONFIG).exists() else ""
            raise UsageError(f"run_dir={run_dir} exists already and is not empty; choose another folder{hint}")
        probe.touch()  # permission bits do not tell: a file system may be read-only, full, or over quota
        probe.unlink()
    except BaseException as error:
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, FileExistsError):
            raise UsageError(f"run_dir={run_dir} exists already; choose another folder") from error
        if isinstance(error, OSError):
            raise UsageError(f"run_dir={run_dir} is not writable: {error.strerror or error}") from error
        raise


def open_existing(run_dir: Path) -> Path:
    """Check that a folder, for resuming or evaluating, is a run's, and return its path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        how = "a file, not a folder" if run_dir.exists() else "no such folder"
        raise UsageError(f"there is no run {run_dir}: {how}")
    if not (run_dir / CONFIG).is_file():
        raise UsageError(f"{run_dir} is not the folder of a run: it has no {CONFIG}")
    return run_dir


def write_config(run_dir: Path, text: str) -> None:
    """Write the resolved config, as YAML text."""
    _write(Path(run_dir) / CONFIG, text if text.endswith("\n") else text + "\n")


def read_config(run_dir: Path) -> str:
    """Read the config of a run as YAML text. Raises `UsageError` if the folder is not a run's."""
    path = open_existing(run_dir) / CONFIG
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error


def write_environment(run_dir: Path, *, world_size: int, device: str) -> None:
    """Write versions and hardware: what another person needs to understand the numbers.

    world_size: processes of the run. device: what rank 0 computes on, such as "cpu" or "cuda:0".
    """
    _write_json(Path(run_dir) / ENVIRONMENT, {**environment(), "world_size": world_size, "device": device})


def write_summary(run_dir: Path, summary: Mapping[str, Any]) -> None:
    """Write how the run ended; it is there whole or not at all.

    summary: at least `SUMMARY_KEYS`. A number that is not finite is written as null, which is what JSON has.
    """
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise ValueError(f"summary: got no {', '.join(missing)}, expected {', '.join(SUMMARY_KEYS)}")
    _write_json(Path(run_dir) / SUMMARY, _finite(summary))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Read how a run ended. Raises `UsageError` when it has not, or the file is damaged."""
    path = Path(run_dir) / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{run_dir} has no {SUMMARY}: that run has not ended") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    return summary


def environment() -> dict[str, Any]:
    """Describe this process's versions and hardware."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "longtrain": longtrain.__version__,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _accelerators() -> list[str]:
    """Names of the GPUs that this process sees."""
    if not torch.accelerator.is_available():
        return []
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device)
    return [str(module.get_device_name(index)) for index in range(torch.accelerator.device_count())]


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+changes" where files differ; None elsewhere."""
    here = Path(longtrain.__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed inside somebody else's repository: not ours
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for, NaN and infinities, by None, in dicts and lists too."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_json(path: Path, content: object) -> None:
    _write(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file whole: into another one beside it, flushed to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error
