"""`longtrain bench training`: both sides in turn, the best of each, and no number before the same losses."""

import re
import sys
from pathlib import Path

import pytest

from longtrain.cli import main
from longtrain.launch import benchmark_training
from longtrain.launch.benchmark_training import Measurement

TINY = ["launch.device=cpu", "data.length=64", "model.width=32", "model.depth=3"]


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Made-up measurements: the order in which they were taken."""
    order: list[str] = []
    rates = {"longtrain": iter([900.0, 1100.0, 1000.0]), "bare": iter([2000.0, 1900.0, 1950.0])}

    def measure(side: str, losses: list[float]) -> Measurement:
        order.append(side)
        return Measurement(losses, next(rates[side]))

    monkeypatch.setattr(benchmark_training, "_run_recipe", lambda *_: measure("longtrain", [5.5, 5.0001]))
    monkeypatch.setattr(benchmark_training, "_run_bare_loop", lambda *_: measure("bare", [5.5, 5.0]))
    return order


def test_alternates_and_compares_the_best(sides: list[str], capsys):
    assert main(["bench", "training", "quickstart", *TINY]) == 0
    shown = capsys.readouterr().out
    assert sides == ["longtrain", "bare"] * 3
    assert "best of 3: longtrain 1,100, bare loop 2,000 tokens/s" in shown
    assert "longtrain / bare loop: 0.550" in shown
    assert "T = 64" in shown and "10 timed steps after 3 of warm-up, 3 times each" in shown
    assert "data 1 x sequence 2" in shown


def test_says_no_number_where_the_losses_differ(sides: list[str], capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_training, "_run_bare_loop", lambda *_: Measurement([5.5, float("nan")], 1.0))
    assert main(["bench", "training", "quickstart", *TINY]) == 1
    shown = capsys.readouterr()
    assert "tokens/s" not in shown.out and "no comparison" in shown.err


@pytest.mark.parametrize(("option", "value"), [("--repeats", "0"), ("--steps", "0"), ("--warm-up", "-1")])
def test_refuses_what_measures_nothing(sides: list[str], capsys, option: str, value: str):
    assert main(["bench", "training", "quickstart", f"{option}={value}"]) == 2
    assert f"{option}: got {value}" in capsys.readouterr().err


def test_measures_a_real_recipe(capsys):
    """Both sides for real: they have the same losses, and a ratio comes out."""
    sizes = ["trainer.sequences=2", "trainer.accumulation=2", "parallel.layout=striped"]
    assert main(["bench", "training", "quickstart", *TINY, *sizes, "--repeats=1", "--steps=2", "--warm-up=1"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"losses agree to \d", shown)
    assert re.search(r"longtrain / bare loop: \d+\.\d{3}\n", shown)


def test_passes_on_what_a_side_says(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'longtrain: data.path: nothing there' >&2\nexit 2\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert main(["bench", "training", "quickstart", *TINY]) == 2
    assert capsys.readouterr().err == "longtrain: data.path: nothing there\n"
    python.write_text("#!/bin/sh\necho 'boom' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="exit code 1:\nboom"):
        main(["bench", "training", "quickstart", *TINY])
