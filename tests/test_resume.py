"""A run that was stopped goes on as if it had not been: after a clean end, and after kill -9 of a rank."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.distributed import run_command, running_command

LONGTRAIN = [sys.executable, "-P", "-m", "longtrain"]
SMALL = ["data.length=512", "trainer.evaluate_sequences=1", "model.width=32", "model.depth=2", "model.mlp_width=64"]
EVERY = ["trainer.evaluate_every=3", "trainer.checkpoint_every=3", "layers.pattern=[lightning,softmax]"]


def train(*words: str, code: int = 0) -> str:
    ended = run_command([*LONGTRAIN, "train", "quickstart", *SMALL, *EVERY, *words], timeout=120)
    assert ended.returncode == code, ended.stdout
    return ended.stdout


def losses(run_dir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == len({record["step"] for record in records})
    return {record["step"]: record["loss"] for record in records}


ALONE = "launch.processes=1"  # where it makes no difference


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 9 steps."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train("trainer.steps=9", f"run_dir={run_dir}")
    return run_dir


def test_resumed_losses_are_bitwise_those_of_an_uninterrupted_run(tmp_path: Path, uninterrupted: Path) -> None:
    run_dir = tmp_path / "run"
    # The first leg is cut by removing what came after its checkpoint at step 6.
    shutil.copytree(uninterrupted, run_dir)
    for path in sorted((run_dir / "checkpoints/step-00000009").iterdir()):
        path.unlink()
    (run_dir / "checkpoints/step-00000009").rmdir()
    train("trainer.steps=9", f"resume={run_dir}")
    assert losses(run_dir) == losses(uninterrupted)
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 9


def test_a_finished_run_can_be_extended(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    constant = ["schedule.name=wsd", "schedule.decay=0", "schedule.warmup=0"]
    train("trainer.steps=4", f"run_dir={run_dir}", ALONE, *constant)
    # Nothing but the change is typed again: the run folder knows the rest.
    resume = [*LONGTRAIN, "train", "quickstart", f"resume={run_dir}"]
    ended = run_command([*resume, "trainer.steps=6"], timeout=120)
    assert ended.returncode == 0, ended.stdout
    assert sorted(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert "steps: 6" in (run_dir / "config.yaml").read_text()
    ended = run_command([*resume, "trainer.steps=5"], timeout=120)
    assert (ended.returncode, ended.stdout.count("\n")) == (2, 1)
    assert ended.stdout.startswith("longtrain: trainer.steps: got 5")


def test_killing_a_rank_ends_the_command_and_names_it_and_the_checkpoint_resumes(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    command = [*LONGTRAIN, "train", "quickstart", *SMALL, *EVERY, "trainer.steps=100000", f"run_dir={run_dir}"]
    with running_command(command, output=output) as process:
        wait_for(run_dir / "checkpoints/step-00000003/manifest.json", process)
        victim = rank_process(process.pid, 1)
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()
        assert process.wait(timeout=60) == 1
        assert time.monotonic() - killed < 60
    said = output.read_text()
    assert f"rank 1 (pid {victim}) was killed by SIGKILL" in said
    assert "Traceback" not in said
    assert not is_alive(victim)
    # The schedule is a pure function of the step and of the number of steps; both runs are still warming up.
    newest = max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))
    train(f"trainer.steps={newest + 2}", f"resume={run_dir}")
    assert sorted(losses(run_dir)) == list(range(1, newest + 3))
    assert losses(run_dir)[3] == losses(uninterrupted)[3]


def test_resume_refuses_other_data_and_other_models(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train("trainer.steps=1", f"run_dir={run_dir}", ALONE)
    before, settings = contents(run_dir), (run_dir / "config.yaml").read_text()
    said = train("trainer.steps=2", f"resume={run_dir}", ALONE, "seed=1", code=2)
    assert said.startswith("longtrain: resume: ") and "seed" in said and said.count("\n") == 1
    said = train("trainer.steps=2", f"resume={run_dir}", ALONE, "model.width=64", code=2)
    assert "embedding" in said and said.count("\n") == 1
    said = train("trainer.steps=2", f"resume={tmp_path / 'nowhere'}", ALONE, code=2)
    assert "nowhere" in said and said.count("\n") == 1
    shard = next((run_dir / "checkpoints/step-00000001").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    said = train("trainer.steps=2", f"resume={run_dir}", ALONE, code=2)
    assert shard.name in said and said.count("\n") == 1
    assert contents(run_dir) == before
    assert (run_dir / "config.yaml").read_text() == settings  # or the next resume would be refused too


def contents(run_dir: Path) -> list[Path]:
    """All that a run folder holds, but for what refused ranks said."""
    return sorted(path for path in run_dir.rglob("*") if "logs" not in path.parts)


def wait_for(path: Path, process, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not come so far"
        time.sleep(0.05)


def rank_process(parent: int, rank: int) -> int:
    """The process below `parent` whose environment says that it is this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            status = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if f"RANK={rank}".encode() in environment and int(status[1]) == parent:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} below {parent}")


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
