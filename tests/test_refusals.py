"""What `longtrain train` refuses: one line, exit code 2, nothing half-written left behind; under torchrun once too."""

import os
import sys
from pathlib import Path

import pytest

from tests.distributed import run_command

LONGTRAIN = [sys.executable, "-P", "-m", "longtrain"]
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = ["data.length=64", "trainer.evaluate_sequences=1", "trainer.steps=1", "model.width=32", "model.depth=1"]


def refused(folder: Path, *words: str) -> str:
    ended = run_command([*LONGTRAIN, "train", "quickstart", *SMALL, *words], cwd=folder, timeout=120)
    assert ended.returncode == 2, ended.stdout
    assert ended.stdout.startswith("longtrain: ") and ended.stdout.count("\n") == 1, ended.stdout
    return ended.stdout


def everything(folder: Path) -> list[tuple[Path, bytes | None]]:
    return [(path, path.read_bytes() if path.is_file() else None) for path in sorted(folder.rglob("*"))]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.stps=3"], ("trainer.stps", "trainer.steps")),
        (["parallel.sequence=3"], ("parallel.sequence", "3", "2 processes", "1, 2")),
        (["data=text", "data.path=nowhere"], ("nowhere",)),
        (["data=text", "data.path=short", "data.length=4096"], ("data.length", "4096")),
        (["run_dir=taken"], ("taken", "run_dir")),
        (["run_dir=file/run"], ("file",)),
        (["resume=taken"], ("taken",)),
    ],
)
def test_one_line_and_nothing_left_behind(tmp_path: Path, overrides: list[str], parts: tuple[str, ...]) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/precious").write_text("keep me")
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "short").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "short" / name).write_text(f"too little text, {name}")
    before = everything(tmp_path)
    said = refused(tmp_path, *overrides)
    assert all(part in said for part in parts), said
    assert everything(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so no folder refuses it")
def test_an_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "closed" in refused(tmp_path, "run_dir=closed/run")


def test_under_torchrun_the_same_line_comes_once(tmp_path: Path) -> None:
    command = [*TORCHRUN, "-m", "longtrain.train", "--config-name", "quickstart", "trainer.stps=3"]
    ended = run_command(command, cwd=tmp_path, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode != 0
    assert ended.stdout.count("longtrain: trainer.stps: no such key (nearest: 'trainer.steps')") == 1


def test_torchrun_trains_with_the_same_entry_and_deepspeeds_argument(tmp_path: Path) -> None:
    words = ["-m", "longtrain.train", "--local_rank=0", "--config-name", "quickstart", *SMALL, "run_dir=run"]
    ended = run_command([*TORCHRUN, *words], cwd=tmp_path, timeout=180, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout
    assert (tmp_path / "run/summary.json").exists()


def test_a_traceback_on_demand(tmp_path: Path) -> None:
    command = [*LONGTRAIN, "train", "quickstart", "trainer.stps=3"]
    ended = run_command(command, cwd=tmp_path, timeout=120, env={"LONGTRAIN_TRACEBACK": "1"})
    assert ended.returncode == 2 and "Traceback" in ended.stdout
