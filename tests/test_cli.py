"""The command `longtrain`: what it refuses, and what it starts."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from longtrain import __version__
from longtrain.cli import main
from longtrain.config import quoted_override
from longtrain.launch import local
from tests.distributed import run_command


@dataclass
class Started:
    """What the launcher would have started."""

    command: Sequence[str]
    processes: int
    logs: Path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Started]:
    """Launches are noted here instead; the working directory is empty and there is no GPU."""
    calls: list[Started] = []

    def note(command: Sequence[str], *, processes: int, logs: Path) -> int:
        calls.append(Started(command, processes, logs))
        return 0

    monkeypatch.setattr(local, "run_ranks", note)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    return calls


def test_help_and_version_come_without_torch():
    code = (
        "import sys\nfrom longtrain.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for argument, expected in (("--help", "longtrain train quickstart"), ("--version", f"longtrain {__version__}")):
        ended = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
        assert expected in ended.stdout
        assert ended.stdout.endswith("0 False\n")


def test_train_starts_the_recipes_processes_with_one_run_folder(started: list[Started]):
    assert main(["train", "quickstart", "trainer.steps=3", "launch.processes=4"]) == 0
    (run,) = started
    assert run.processes == 4
    assert list(run.command[:5]) == [sys.executable, "-m", "longtrain.train", "--config-name", "quickstart"]
    assert list(run.command[5:7]) == ["trainer.steps=3", "launch.processes=4"]
    assert run.logs.name == "logs" and run.logs.parent.parent == Path("runs")
    assert run.command[7:] == [f"run_dir='{run.logs.parent}'"]  # rank 0 makes this folder, not one of its own time


def test_train_keeps_a_given_run_folder(started: list[Started]):
    assert main(["train", "quickstart", "run_dir=my run"]) == 0
    assert started[0].logs == Path("my run/logs")


def test_train_resumes_in_the_same_folder(started: list[Started], tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("recipe: quickstart\nlaunch: {processes: 2}\n")
    assert main(["train", "quickstart", "resume=old"]) == 0
    assert started[0].logs == Path("old/logs")
    assert not any(word.startswith("run_dir") for word in started[0].command)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["quickstrat"], ["quickstrat", "quickstart"]),
        (["quickstart", "trainer.stepps=3"], ["trainer.stepps", "trainer.steps"]),
        (["quickstart", "trainer.steps=many"], ["trainer.steps", "many", "whole number"]),
        (["quickstart", "parallel.sequence=3"], ["parallel.sequence", "3", "divide the 2 processes"]),
        (["quickstart", "launch.device=cuda"], ["launch.device", "cuda", "launch.device=cpu"]),
    ],
)
def test_train_refuses_in_one_line_before_any_process_starts(
    started: list[Started], capsys, arguments: list[str], names: list[str]
):
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("longtrain: ") and all(name in shown.err for name in names)
    assert not started
    assert os.listdir() == []  # nothing half-written


def test_train_refuses_degrees_that_do_not_fit_the_gpus(
    started: list[Started], capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert main(["train", "quickstart", "launch.processes=3", "parallel.sequence=3"]) == 2
    assert "divide the 4 processes" in capsys.readouterr().err
    assert not started


def test_a_traceback_on_request(started: list[Started], capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LONGTRAIN_TRACEBACK", "1")
    assert main(["train", "quickstrat"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_folder_that_is_no_run_is_refused(started: list[Started], capsys, command: str):
    assert main([command, "nowhere"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and "nowhere" in shown
    assert not started


def test_generate_passes_its_options_on(monkeypatch: pytest.MonkeyPatch):
    from longtrain import generation

    seen: list[list[str]] = []
    monkeypatch.setattr(generation, "main", lambda arguments: seen.append(list(arguments)) or 0)
    assert main(["generate", "runs/a", "--prompt=-x", "--tokens", "5"]) == 0
    assert seen == [["runs/a", "--prompt=-x", "--tokens=5"]]


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1))
def test_any_path_survives_as_an_override(value: str):
    (override,) = OverridesParser.create().parse_overrides([quoted_override("run_dir", value)])
    assert override.key_or_group == "run_dir"
    assert override.value() == value


@pytest.mark.parametrize("value", ["plain", "it's", "a=b,c", "\\", "\\'", "a\\b"])
def test_these_paths_survive_as_an_override(value: str):
    (override,) = OverridesParser.create().parse_overrides([quoted_override("run_dir", value)])
    assert override.value() == value


def test_a_reader_that_has_enough_ends_a_command_quietly() -> None:
    command = f"{sys.executable} -P -m longtrain plan llama_8b_128k --devices 8xh200 | true; echo ${{PIPESTATUS[0]}}"
    ended = run_command(["bash", "-c", command], timeout=120)
    assert ended.stdout == "141\n"
