"""Metrics of a run: one JSON object per step in metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from longtrain.errors import UsageError

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsWriter:
    """Writes the records of a run. Rank 0 has one; usable in a `with` block, which closes it.

    run_dir: a new run's folder, or, with `resume_step`, that of the run that goes on after this step. What was written
    after it, before the run stopped, is dropped: those steps come again.
    """

    def __init__(self, run_dir: Path, *, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes about a second, which other ranks are spared

        path = Path(run_dir) / METRICS
        self._step = 0 if resume_step is None else resume_step
        if resume_step is not None:
            _drop_after(path, resume_step)
        try:
            self._lines: TextIO = open(path, "x" if resume_step is None else "a", encoding="utf-8")
        except FileExistsError as error:
            raise UsageError(f"{path} exists already: a run writes into a new folder, or resumes one") from error
        self._tensorboard = SummaryWriter(
            str(Path(run_dir) / TENSORBOARD), purge_step=None if resume_step is None else resume_step + 1
        )

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one step's record: `step`, above the last one, and any numbers.

        The line is in the file when this returns, so that a killed run keeps it. A number that is not finite is
        written as null, which is what JSON has; TensorBoard gets it as it is.
        """
        step = record["step"]
        if step <= self._step:
            raise ValueError(f"record: got step {step} after step {self._step}, expected a later one")
        self._step = step
        plain = {key: _plain(value) for key, value in record.items()}
        self._lines.write(json.dumps(plain, allow_nan=False) + "\n")
        self._lines.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                self._tensorboard.add_scalar(key, value, step)

    def close(self) -> None:
        """Write out what is left."""
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all records of a metrics.jsonl, in order.

    A last line that was cut off when the run was killed is left out. Raises `UsageError` for a file that is missing,
    and for any other line that is no record, naming it.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines):  # a whole file ends with a line feed, so this is empty, or what was cut off
            break
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UsageError(f"{path}, line {number} is damaged: {line[:60]!r}")
        records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    """Keep the records up to a step, by way of another file, so that a kill meanwhile loses nothing."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    temporary = path.with_name(f".{path.name}.writing")
    with open(temporary, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in kept)
        lines.flush()
        os.fsync(lines.fileno())
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
