"""The screen: plain lines into a file, a moving bar on a terminal, silence on all ranks but the first."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longtrain.screen import Screen

HEADER = ["quickstart: layers [lightning, softmax]", "run folder: " + "x" * 150]


class Clock:
    """Time that passes when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int, **extra: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.34567,
        "tokens_per_second": 11212.7,
        "tokens_per_second_per_device": 5606.3,
        "memory_bytes": 450 * 2**20,
        **extra,
    }


def make(*, terminal: bool, width: int = 100, **options: Any) -> tuple[Screen, io.StringIO, Clock]:
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=terminal, width=width, color_system=None, _environ={"TERM": "xterm"})
    return Screen(console=console, clock=clock, **options), output, clock


def run(screen: Screen, clock: Clock, steps: range, total: int, seconds: float = 1.0) -> None:
    screen.start(total, steps.start - 1, HEADER)
    for step in steps:
        clock.now += seconds
        screen.step(record(step, **({"held_out_loss": 1.98764} if step == 7 else {})))


def test_plain_lines_into_a_file() -> None:
    screen, output, clock = make(terminal=False, width=40)
    run(screen, clock, range(1, 31), total=30)
    lines = output.getvalue().splitlines()
    assert lines[:2] == HEADER  # as they are: brackets are no markup, a path is not broken
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines[2:]] == [1, 7, 17, 27, 30]
    assert lines[2] == "step 1/30  loss 2.346  11,213 tokens/s  5,606/device  450 MiB"
    assert lines[3].endswith("0:23 left  held-out loss 1.9876")
    assert lines[-1].endswith("0:00 left")
    assert "\x1b" not in output.getvalue()


def test_a_terminal_has_a_bar_and_a_line_of_numbers() -> None:
    screen, output, clock = make(terminal=True)
    run(screen, clock, range(1, 31), total=30)
    screen.close()
    text = output.getvalue()
    assert "11,213 tokens/s · 5,606/device · 450 MiB" in text
    assert "30/30 0:00 left" in text and "step 7: held-out loss 1.9876\n" in text
    assert "\x1b[?25l" in text and text.count("\x1b[?25h") == 1  # the cursor comes back


@pytest.mark.parametrize("width", [50, 80, 120])
def test_bar_and_numbers_fit_a_terminal(width: int) -> None:
    screen, output, clock = make(terminal=True, width=width)
    run(screen, clock, range(9995, 10000), total=10000, seconds=4000.0)
    screen.close()
    bar, numbers = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "", output.getvalue().split("\r")[-1]).splitlines()[-2:]
    assert len(bar) == width and "━" * 20 in bar and bar.rstrip().endswith("9999/10000 1:06:40 left")
    assert len(numbers) <= width and numbers.rstrip().endswith("450 MiB" if width > 60 else "…")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80, _environ={"TERM": "dumb"})
    screen = Screen(console=console)
    run(screen, Clock(), range(1, 3), total=2)
    assert "step 2/2" in output.getvalue() and "\x1b" not in output.getvalue()


def test_other_ranks_are_silent() -> None:
    for terminal in (True, False):
        screen, output, clock = make(terminal=terminal, enabled=False)
        run(screen, clock, range(1, 31), total=30)
        screen.note("a note")
        screen.finish({"recipe": "quickstart"}, [Path("a")])
        assert output.getvalue() == ""


def test_time_left_follows_the_pace_after_the_first_step_and_counts_from_the_resumed_one() -> None:
    screen, output, clock = make(terminal=False, line_seconds=0.0)
    screen.start(200, 100, [])
    for step, now in ((101, 50.0), (102, 52.0), (103, 56.0)):  # the first step holds the warming up
        clock.now = now
        screen.step(record(step))
    lines = output.getvalue().splitlines()
    assert "left" not in lines[0]
    assert lines[1].endswith("3:16 left") and lines[2].endswith("4:51 left")
    clock.now += 3600 * 3
    screen.step(record(104))
    assert output.getvalue().splitlines()[-1].endswith("96:03:12 left")


@pytest.fixture(params=[True, False])
def ended(request: pytest.FixtureRequest) -> Iterator[str]:
    screen, output, clock = make(terminal=request.param)
    run(screen, clock, range(1, 3), total=2)
    summary = {
        "recipe": "quick[bold]start",
        "held_out_loss": 1.87654,
        "train_seconds": 192.4,
        "tokens": 2949120,
        "tokens_per_second": 15331.2,
        "peak_memory_bytes": 3 * 2**30 / 2,
        "world_size": 2,
        "sequence_degree": 2,
        "finished": "later",
    }
    screen.finish(summary, [Path("runs/a/" + "y" * 120 + ".png"), Path("runs/a/summary.json")])
    yield output.getvalue()


def test_the_end_is_a_table_and_paths(ended: str) -> None:
    for text in ("quick[bold]start", "1.8765", "3:12", "2,949,120", "15,331", "1.5 GiB"):
        assert text in ended
    assert "later" not in ended
    assert ended.splitlines()[-2:] == ["  runs/a/" + "y" * 120 + ".png", "  runs/a/summary.json"]


def test_an_error_ends_the_bar() -> None:
    screen, output, clock = make(terminal=True)
    with pytest.raises(RuntimeError), screen:
        run(screen, clock, range(1, 3), total=9)
        raise RuntimeError("of the step")
    assert output.getvalue().endswith("\x1b[?25h")
