"""What was measured, as lines on the screen, as markdown and as JSON."""

import datetime
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from longtrain.run_folder import environment


@dataclass(frozen=True)
class Row:
    """One number that was measured, of one side of a case.

    value: in `unit`; samples: seconds of each repeat; ratio: of this side to the one it is compared with, by `bar`
    where the project has set one.
    """

    part: str
    case: str
    side: str
    measured: str  # "forward", "backward", "both", "peak memory"
    value: float
    unit: str
    samples: tuple[float, ...] = ()
    ratio: float | None = None
    bar: str = ""  # ">= 1.0", "<= 1.5 ms"
    met: bool | None = None
    error: float | None = None  # of the check that came before
    floor: float | None = None  # of the value, by the roofline
    predicted: float | None = None  # what the design can come down to, by the roofline


@dataclass
class Report:
    """Rows as they come, printed at once."""

    device: torch.device
    command: str
    repeats: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        extras = [f"x {row.ratio:.2f}"] if row.ratio is not None else []
        if row.bar:
            extras.append(f"bar {row.bar}: {'met' if row.met else 'MISSED'}")
        shown = "  ".join([f"{row.value:12.4g} {row.unit}", *extras])
        print(f"{row.part:13} {row.case:44} {row.side:24} {row.measured:11} {shown}", flush=True)

    def note(self, text: str) -> None:
        """Something that could not be measured, or how to read what was."""
        self.notes.append(text)
        print(text, flush=True)

    @property
    def hardware(self) -> str:
        machine = environment()
        on_cpu = self.device.type == "cpu"
        chips = f"{machine['cpu']}, {machine['cores']} cores" if on_cpu else ", ".join(machine["accelerators"])
        return f"{chips}, {machine['memory_bytes'] / 2**30:.0f} GiB of host memory"

    @property
    def name(self) -> str:
        """Of the files: the card's, or kernels_cpu."""
        if self.device.type == "cpu":
            return "kernels_cpu"
        card = torch.cuda.get_device_name(self.device).lower().replace("nvidia", "")
        return re.sub(r"[^a-z0-9]+", "_", card).strip("_")

    def settings(self) -> dict[str, str]:
        machine = environment()
        versions = f"Python {machine['python']}, torch {machine['torch']}, triton {machine['triton']}"
        return {
            "hardware": self.hardware,
            "software": f"{versions}, longtrain {machine['longtrain']}",
            "threads": str(torch.get_num_threads()),
            "method": f"sides in turn, {self.repeats} samples each after one run of warm-up, median; a sample on a GPU "
            "repeats short calls for 20 ms",
            "checked first": "output and gradients of each side, relative error (norm of the difference) in the table",
        }

    def markdown(self) -> str:
        where = "a CPU" if self.device.type == "cpu" else self.hardware.split(",")[0]
        settings = "\n".join(f"| {name} | {value} |" for name, value in self.settings().items())
        text = [f"# The kernels on {where}", f"`{self.command}`, {datetime.date.today().isoformat()}."]
        text.append(f"| what | setting |\n|---|---|\n{settings}")
        for part in dict.fromkeys(row.part for row in self.rows):
            text.append(f"## {part}\n\n" + _table([row for row in self.rows if row.part == part]))
        if self.notes:
            text.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(text) + "\n"

    def write(self, folder: Path) -> None:
        """Markdown and JSON, by the hardware's name."""
        (folder / f"{self.name}.md").write_text(self.markdown(), encoding="utf-8")
        record: dict[str, Any] = {
            "command": self.command,
            "date": datetime.date.today().isoformat(),
            **self.settings(),
            "rows": [asdict(row) for row in self.rows],
            "notes": self.notes,
        }
        (folder / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written: {folder / self.name}.md and .json", flush=True)


def _table(rows: Sequence[Row]) -> str:
    header = ["case", "side", "measured", "median", "predicted", "floor / median", "ratio", "bar", "error"]
    lines = []
    for row in rows:
        bar = f"{row.bar} {'met' if row.met else '**missed**'}" if row.bar else ""
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        floor = "" if row.floor is None else f"{row.floor / row.value:.2f}"
        error = "" if row.error is None else f"{row.error:.1e}"
        predicted = "" if row.predicted is None else f"{row.predicted:.4g} {row.unit}"
        value = f"{row.value:.4g} {row.unit}"
        lines.append([row.case, row.side, row.measured, value, predicted, floor, ratio, bar, error])
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
