"""Run folders: refused when taken or unwritable with nothing left behind; files are whole or not there."""

import json
import math
import os
import re
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

from longtrain import run_folder
from longtrain.errors import UsageError

SUMMARY: dict[str, object] = dict.fromkeys(run_folder.SUMMARY_KEYS, 1.5)


def test_default_name() -> None:
    name = run_folder.default_name("quickstart", datetime(2026, 1, 31, 23, 5, 9))
    assert name == Path("runs/quickstart-20260131-230509")
    assert re.fullmatch(r"runs/a-b-\d{8}-\d{6}", str(run_folder.default_name("a/b")))


def test_a_new_folder_and_an_empty_one_are_taken(tmp_path: Path) -> None:
    run_folder.create(tmp_path / "runs" / "a")
    assert list((tmp_path / "runs" / "a").iterdir()) == []
    run_folder.create(tmp_path / "runs" / "a")


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "a"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"run_dir=.*a exists already and is not empty; choose another folder$"):
        run_folder.create(run_dir)
    run_folder.write_config(run_dir, "seed: 1")
    with pytest.raises(UsageError, match=r"to go on with that run, resume="):
        run_folder.create(run_dir)
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.yaml", "notes.txt"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        run_folder.create(tmp_path / "file")
    with pytest.raises(UsageError, match="is not writable: Not a directory"):
        run_folder.create(tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
def test_an_unwritable_place_is_refused_with_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise error

    (tmp_path / "old").mkdir()
    monkeypatch.setattr(Path, "touch", refuse)  # permission bits would not stop a test that root runs
    with pytest.raises(UsageError, match=f"run_dir=.* is not writable: {error.strerror}"):
        run_folder.create(tmp_path / "runs" / "deep" / "a")
    with pytest.raises(UsageError, match="is not writable"):
        run_folder.create(tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_run_that_is_quicker_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "runs" / "a"
    make = Path.mkdir

    def both(self: Path, *arguments: object, **options: object) -> None:
        if self == run_dir:
            make(self)
        make(self, *arguments, **options)  # pyright: ignore[reportArgumentType] -- handed on as they came

    monkeypatch.setattr(Path, "mkdir", both)
    with pytest.raises(UsageError, match="exists already"):
        run_folder.create(run_dir)
    assert run_dir.is_dir()


def test_what_is_no_run_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        run_folder.open_existing(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="it has no config.yaml"):
        run_folder.open_existing(tmp_path)
    with pytest.raises(UsageError, match="it has no config.yaml"):
        run_folder.read_config(tmp_path)
    run_folder.write_config(tmp_path, "seed: 1")
    assert run_folder.open_existing(tmp_path) == tmp_path
    assert run_folder.read_config(tmp_path) == "seed: 1\n"
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"config.yaml cannot be read"):
        run_folder.read_config(tmp_path)


def test_environment_has_versions_and_hardware(tmp_path: Path) -> None:
    run_folder.write_environment(tmp_path, world_size=2, device="cpu")
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__ and environment["python"].startswith("3.")
    assert environment["world_size"] == 2 and environment["device"] == "cpu"
    assert environment["cores"] >= 1 and environment["memory_bytes"] > 2**28
    assert environment["cpu"] and environment["longtrain"] and environment["platform"]
    assert len(environment["accelerators"]) == (torch.accelerator.device_count() if torch.cuda.is_available() else 0)


def test_the_commit_is_that_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "longtrain"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other.py").touch()
    monkeypatch.setattr("longtrain.__file__", str(package / "__init__.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert run_folder._git_commit() is None  # no checkout
    git("init", "-q")
    git("add", "other.py")
    git("commit", "-qm", "one")
    assert run_folder._git_commit() is None  # installed inside somebody else's
    git("add", ".")
    git("commit", "-qm", "two")
    commit = git("rev-parse", "HEAD")
    assert run_folder._git_commit() == commit
    (tmp_path / "other.py").write_text("x = 1\n")
    assert run_folder._git_commit() == commit + "+changes"


def test_summary_is_whole_strict_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has not ended"):
        run_folder.read_summary(tmp_path)
    with pytest.raises(ValueError, match="summary: got no held_out_loss, recipe, expected"):
        run_folder.write_summary(tmp_path, {k: v for k, v in SUMMARY.items() if k not in ("held_out_loss", "recipe")})
    run_folder.write_summary(tmp_path, {**SUMMARY, "held_out_loss": math.nan, "losses": [1.0, (math.inf,)]})
    assert run_folder.read_summary(tmp_path) == {**SUMMARY, "held_out_loss": None, "losses": [1.0, [None]]}
    assert "NaN" not in (tmp_path / "summary.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UsageError, match="summary.json cannot be read"):
        run_folder.read_summary(tmp_path)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.write_summary(tmp_path, SUMMARY)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"summary.json cannot be written: No space left"):
        run_folder.write_summary(tmp_path, {**SUMMARY, "recipe": "other"})
    assert run_folder.read_summary(tmp_path) == SUMMARY
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
