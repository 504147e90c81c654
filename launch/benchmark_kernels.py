"""`longtrain bench kernels`: what the kernels take on this machine, their floors, and what compilers make of them.

One process measures all; this starts it with as many threads as the machine has cores.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from longtrain.errors import UsageError
from longtrain.launch.local import KEEP_MEMORY, cores

WORKER = "longtrain.bench_kernels"
ON_CPU = ("linear", "delta", "conv", "cross-entropy")
ON_GPU = ("softmax", "packed", "ring-step", "linear", "lengths", "delta", "slots", "conv", "cross-entropy")


@dataclass(frozen=True)
class Options:
    """What to measure; see `longtrain bench kernels --help`."""

    device: str  # "cpu" or "cuda"
    repeats: int
    only: tuple[str, ...]  # parts; none: all
    write: Path | None
    resources: bool
    roofline: bool


def options(
    *,
    device: str | None,
    repeats: int,
    only: str | None,
    write: Path | None,
    resources: bool,
    roofline: bool,
) -> Options:
    """Checked options.

    Raises:
        UsageError: a value that cannot work.
    """
    import torch

    if device not in (None, "cpu", "gpu"):
        raise UsageError(f"--device: got {device!r}, expected cpu or gpu")
    gpu = torch.cuda.is_available()
    if device == "gpu" and not gpu:
        raise UsageError("--device: got gpu, but PyTorch finds none here; --device cpu would work")
    chosen = "cuda" if gpu and device != "cpu" else "cpu"
    parts = ON_GPU if chosen == "cuda" else ON_CPU
    names = () if only is None else tuple(dict.fromkeys(name.strip() for name in only.split(",")))
    for name in names:
        if name not in parts:
            where = "on a GPU" if chosen == "cuda" else "on a CPU"
            raise UsageError(f"--only: got {name!r}, expected {where} names out of {', '.join(parts)}")
    if repeats < 1:
        raise UsageError(f"--repeats: got {repeats}, expected 1 or more")
    if write is not None and not write.is_dir():
        raise UsageError(f"--write: got {write}, expected a folder that exists")
    if resources and roofline:
        raise UsageError("--resources: got --roofline too, expected one of them")
    return Options(chosen, repeats, names, write, resources, roofline)


def run(chosen: Options) -> int:
    """Measure and print; 0, or 1 where results were wrong."""
    words = [sys.executable, "-m", WORKER, "--device", chosen.device, "--repeats", str(chosen.repeats)]
    words += ["--threads", str(cores())]
    words += ["--only", ",".join(chosen.only)] if chosen.only else []
    words += ["--write", str(chosen.write)] if chosen.write is not None else []
    words += ["--resources"] * chosen.resources + ["--roofline"] * chosen.roofline
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(cores()), **KEEP_MEMORY}
    return subprocess.run(words, env=environment).returncode
