"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, a table at the end."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text


class Screen:
    """Shows the progress of a run; only rank 0's is enabled, the others' do nothing.

    On a terminal there is a bar, and a line of numbers below it. Otherwise (a file, a pipe, a batch system) there are
    plain lines: the first and the last step, those with a held-out loss, and one every `line_seconds` between them.

    Use it in a `with` block, or call `close`, so that an error's text does not run into the bar.
    `clock` gives seconds, for the time left.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        console: Console | None = None,
        line_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self._console = console or Console(highlight=False)
        self._line_seconds = line_seconds
        self._clock = clock
        self._total = 0
        self._first: tuple[int, float] | None = None  # step and time of the first record: it holds the warming up
        self._last_line = float("-inf")
        self._bar = Progress(
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task("", left="")
        self._status = ""
        self._live: Live | None = None  # what moves on a terminal, while the run goes on

    def start(self, total_steps: int, first_step: int, header: Sequence[str]) -> None:
        """Show what is to run: `header` lines, then a bar that stands at `first_step` (0, or where a run resumes)."""
        if not self.enabled:
            return
        self._total = total_steps
        for line in header:
            self.note(line)
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar.update(self._task, total=total_steps, completed=first_step)
            self._live = Live(get_renderable=self._render, console=self._console)
            self._live.start()
            atexit.register(self.close)  # a bar that is not stopped leaves the terminal without a cursor

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step's record: `step`, `loss`, `tokens_per_second`, and, where they are there,
        `tokens_per_second_per_device`, `memory_bytes` and `held_out_loss`."""
        if not self.enabled:
            return
        step, now = record["step"], self._clock()
        if self._first is None:
            self._first = (step, now)
        parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"]
        if "tokens_per_second_per_device" in record:
            parts.append(f"{record['tokens_per_second_per_device']:,.0f}/device")
        if "memory_bytes" in record:
            parts.append(_bytes(record["memory_bytes"]))
        seconds_left = self._seconds_left(step, now)
        left = "" if seconds_left is None else f"{_duration(seconds_left)} left"
        held_out = f"held-out loss {record['held_out_loss']:.4f}" if "held_out_loss" in record else None
        if self._live is not None:
            self._bar.update(self._task, completed=step, left=left)
            self._status = " · ".join(parts)
            if held_out:
                self.note(f"step {step}: {held_out}")
        elif held_out or step in (self._first[0], self._total) or now - self._last_line >= self._line_seconds:
            self._last_line = now
            self.note("  ".join(filter(None, [f"step {step}/{self._total}", *parts, left, held_out])))

    def note(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self.enabled:
            # As it is: no markup (a list of mixers stands in brackets), no wrapping in the middle of a path.
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any], paths: Sequence[Path]) -> None:
        """End the bar; show the summary as a short table, and the files to look at."""
        self.close()
        if not self.enabled:
            return
        table = Table(show_header=False)
        for key, (label, show) in _ROWS.items():
            if key in summary:
                table.add_row(label, Text(show(summary[key]), justify="right"))
        self._console.print(table)
        for path in paths:
            self.note(f"  {path}")

    def close(self) -> None:
        """End the bar, if there is one; what it showed last stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            atexit.unregister(self.close)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _render(self) -> Group:
        return Group(self._bar, Text(self._status, no_wrap=True, overflow="ellipsis"))

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Seconds to the last step at the pace since the first record; None after the first, which tells no pace."""
        if self._first is None or step <= self._first[0]:
            return None
        return (now - self._first[1]) / (step - self._first[0]) * (self._total - step)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# What the table shows of the summary, in this order; the file has the rest.
_ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "recipe": ("recipe", str),
    "held_out_loss": ("held-out loss, nats per token", lambda value: f"{value:.4f}"),
    "held_out_accuracy": ("held-out accuracy", lambda value: f"{100 * value:.2f} %"),
    "tokens": ("tokens trained on", lambda value: f"{value:,}"),
    "train_seconds": ("training time", _duration),
    "tokens_per_second": ("tokens per second", lambda value: f"{value:,.0f}"),
    "peak_memory_bytes": ("peak memory of a process", _bytes),
    "world_size": ("processes", str),
    "sequence_degree": ("of which share a sequence", str),
}
