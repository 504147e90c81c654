"""torchrun, deepspeed and SLURM: what `longtrain train --print` shows, what it refuses, and what a job's shell runs."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from longtrain.cli import main
from longtrain.launch import deepspeed, slurm
from longtrain.launch.hosts import Command
from tests.distributed import run_command

TRAIN = ["longtrain.train", "--config-name", "quickstart"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory, no GPU, and nothing set that a launcher would leave as it is."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "TORCH_EXTENSIONS_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def shown(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[dict[str, str], list[str]]:
    """Environment and words that `--print` shows; nothing is left behind."""
    before = sorted(Path().iterdir())
    assert main(["train", "quickstart", "--print", *overrides]) == 0
    assert sorted(Path().iterdir()) == before
    text = "\n".join(line for line in capsys.readouterr().out.splitlines() if not line.startswith("#"))
    words = shlex.split(text.replace("\\\n", " "))
    split = next(place for place, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:split]), words[split:]


def test_print_shows_a_local_run(capsys: pytest.CaptureFixture[str]) -> None:
    environment, words = shown(capsys, "run_dir=my run", "launch.processes=2")
    assert words == [sys.executable, "-m", *TRAIN, "run_dir=my run", "launch.processes=2", "run_dir='my run'"]
    assert environment["PYTHONSAFEPATH"] == "1" and environment["GLOO_SOCKET_IFNAME"] == "lo"


def test_torchrun_on_one_node(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment, words = shown(capsys, "launch.launcher=torchrun", "launch.processes=2")
    assert words[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"),
        *(*TRAIN, "launch.launcher=torchrun", "launch.processes=2"),
    ]
    assert "OMP_NUM_THREADS" not in environment  # the user's own stays
    assert environment["GLOO_SOCKET_IFNAME"] == "lo" and environment["PYTHONSAFEPATH"] == "1"


def test_torchrun_on_two_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    Path("hosts").write_text("# two machines\none slots=2\ntwo slots=2  # the same\n\n")
    given = ["launch.launcher=torchrun", "launch.hostfile=hosts", "launch.node_rank=1", "launch.processes=4"]
    given += ["parallel.sequence=4"]
    environment, words = shown(capsys, *given)
    options = ["--nnodes=2", "--node_rank=1", "--master_addr=one", "--master_port=29500", "--nproc_per_node=2", "-m"]
    assert words[1:] == ["-m", "torch.distributed.run", *options, *TRAIN, *given]
    assert "GLOO_SOCKET_IFNAME" not in environment
    given = ["launch.launcher=torchrun", "launch.nodes=2", "launch.node_rank=0", "launch.address=[fe80::1]:700"]
    _, words = shown(capsys, *given)
    options = ["--nnodes=2", "--node_rank=0", "--master_addr=[fe80::1]", "--master_port=700", "--nproc_per_node=1"]
    assert words[3:8] == options


def test_this_host_is_found_in_the_hostfile(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "two.cluster")
    Path("hosts").write_text("one slots=1\ntwo slots=1\n")
    _, words = shown(capsys, "launch.launcher=torchrun", "launch.hostfile=hosts")
    assert "--node_rank=1" in words


def test_deepspeed_always_gets_a_number_of_devices(capsys: pytest.CaptureFixture[str]) -> None:
    environment, words = shown(capsys, "launch.launcher=deepspeed", "launch.address=here:4242")
    runner = ["-m", "deepspeed.launcher.runner"]
    alone = ["--master_port=4242", "--num_gpus=2", "--hostfile=/dev/null", "--module"]
    assert words[1:] == [*runner, *alone, *TRAIN, "launch.launcher=deepspeed", "launch.address=here:4242"]
    assert environment["PYTHONSAFEPATH"] == "1" and Path(environment["TORCH_EXTENSIONS_DIR"]).is_absolute()
    Path("hosts").write_text("one slots=1\ntwo slots=1\n")
    given = ["launch.launcher=deepspeed", "launch.hostfile=hosts", "launch.node_rank=1"]
    _, words = shown(capsys, *given)
    options = ["--master_addr=one", "--master_port=29500", "--num_gpus=1", "--hostfile=hosts", "--num_nodes=2"]
    assert words[1:] == [*runner, *options, "--no_ssh", "--node_rank=1", "--module", *TRAIN, *given]


def test_deepspeed_reaches_all_nodes_by_pdsh(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed.shutil, "which", lambda name: f"/usr/bin/{name}")
    Path("hosts").write_text("one slots=1\ntwo slots=1\n")
    _, words = shown(capsys, "launch.launcher=deepspeed", "launch.hostfile=hosts")
    assert "--num_nodes=2" in words and "--no_ssh" not in words and "--num_gpus=1" in words


JOB = ["launch.launcher=slurm", "launch.nodes=2", "launch.slurm.gpus_per_node=4", "launch.slurm.cpus_per_node=64"]
JOB += ["launch.slurm.time=12:00:00", "launch.slurm.partition=long", "trainer.sequences=4", "parallel.sequence=2"]
JOB += ["launch.slurm.setup=[echo ready]", "run_dir=it's here"]


def test_a_jobs_shell_runs_torchrun_with_what_slurm_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sbatch, scontrol and srun of the test's own; the last runs the command as its second node and notes it."""
    for name, text in (
        ("sbatch", 'cat > job; export SLURM_JOB_ID=41 SLURM_JOB_NODELIST="n[1-2]"; bash job'),
        ("scontrol", '[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"'),
        ("srun", f'export SLURM_NODEID=1; "$2" "$3" "words ${{4#exec {shlex.quote(sys.executable)}}}"'),
        ("words", 'printf "%s\\n" "$@" > noted; env > environment'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = [sys.executable, "-P", "-m", "longtrain", "train", "quickstart", *JOB]
    ended = run_command(command, timeout=120, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert (ended.returncode, ended.stdout) == (0, "ready\n")
    assert (tmp_path / "noted").read_text().splitlines() == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=4", "--node_rank=1", "--master_addr=n1"),
        *("--master_port=20041", "-m", *TRAIN, *JOB),
    ]
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"PYTHONSAFEPATH=1", "OMP_NUM_THREADS=16"} <= set(environment)
    assert main(["train", "quickstart", *JOB, "--print"]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "job").read_text()
    asked = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert asked[:6] == [
        *("job-name=longtrain-quickstart", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=64"),
        "time=12:00:00",
    ]
    assert "partition=long" in asked and not any(line.startswith(("mem", "account")) for line in asked)


@pytest.mark.parametrize(
    ("hostfile", "overrides", "parts"),
    [
        (None, ["torchrun", "launch.hostfile=hsts"], ("launch.hostfile", "hsts", "no such file", "HOST slots=N")),
        ("one slots=0\n", ["torchrun", "launch.hostfile=hosts"], ("hosts, line 1", "'one slots=0'", "HOST slots=N")),
        ("one slots=1\none slots=2\n", ["deepspeed", "launch.hostfile=hosts"], ("line 2", "one is there twice")),
        ("# none\n", ["deepspeed", "launch.hostfile=hosts"], ("names no host",)),
        ("a slots=1\nb slots=2\n", ["torchrun", "launch.hostfile=hosts"], ("different slots (a 1, b 2)",)),
        (
            "a slots=2\nb slots=2\n",
            ["deepspeed", "launch.hostfile=hosts", "launch.processes=2"],
            ("launch.processes: got 2", "4 slots", "launch.processes=4"),
        ),
        ("a slots=2\n", ["torchrun", "launch.hostfile=hosts", "launch.nodes=2"], ("launch.nodes: got 2", "1 hosts")),
        ("a slots=1\nb slots=1\n", ["torchrun", "launch.hostfile=hosts"], ("launch.node_rank", "no line for")),
        (
            "a slots=1\nb slots=1\n",
            ["torchrun", "launch.hostfile=hosts", "launch.node_rank=2"],
            ("launch.node_rank: got 2", "0 to 1"),
        ),
        ("a slots=1\nb slots=1\n", ["deepspeed", "launch.hostfile=hosts"], ("pdsh", "launch.node_rank=0")),
        (None, ["deepspeed", "launch.nodes=2", "launch.node_rank=0"], ("launch.hostfile: got none", "HOST slots=N")),
        (None, ["torchrun", "launch.nodes=2", "launch.node_rank=0"], ("launch.address: got none", "HOST:PORT")),
        (None, ["torchrun", "launch.nodes=3"], ("launch.nodes: got 3", "2 processes")),
        (None, ["slurm", "launch.nodes=3"], ("launch.nodes: got 3", "2 processes")),
        (None, ["slurm"], ("no command sbatch", "--print")),
        (None, ["slurm", "launch.device=cuda"], ("launch.slurm.gpus_per_node: got none", "1 or more")),
        (None, ["slurm", "launch.hostfile=hosts"], ("launch.hostfile", "launch.nodes")),
        (None, ["local", "launch.nodes=2"], ("launch.nodes: got 2", "launch.launcher=local", "torchrun")),
        (None, ["local", "launch.hostfile=hosts"], ("launch.hostfile: got 'hosts'", "launch.launcher=local")),
        (None, ["torchrn"], ("launch.launcher: got 'torchrn' (nearest: 'torchrun')", "local, torchrun, deepspeed")),
        (None, ["torchrun", "launch.address=a:b"], ("launch.address: got 'a:b'", "HOST:PORT")),
        (None, ["slurm", "launch.slurm.gpus_per_node=0"], ("launch.slurm.gpus_per_node", "1 or more")),
        (None, ["torchrun", "launch.node_rank=-1"], ("launch.node_rank", "0 or more")),
    ],
)
def test_refusals(
    hostfile: str | None,
    overrides: list[str],
    parts: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Command, "become", lambda self: pytest.fail("it would start"))
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    if hostfile is not None:
        Path("hosts").write_text(hostfile)
    assert main(["train", "quickstart", f"launch.launcher={overrides[0]}", *overrides[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("longtrain: ") and said.count("\n") == 1
    assert all(part in said for part in parts), said


def test_deepspeed_that_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.importlib.util, "find_spec", lambda name: None)
    assert main(["train", "quickstart", "launch.launcher=deepspeed", "--print"]) == 2
    assert "pip install deepspeed" in capsys.readouterr().err


def test_options_may_stand_between_keys(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["launch.launcher=torchrun", "trainer.steps=3"]
    assert shown(capsys, *given)[1][-2:] == given
    with pytest.raises(SystemExit):
        main(["train", "quickstart", "--print", "trainer.steps=3", "--prnt"])
    assert "unrecognized arguments: trainer.steps=3 --prnt" in capsys.readouterr().err
