"""One recipe trained across two hosts (network namespaces), by torchrun and by deepspeed's launcher."""

import contextlib
import json
import sys
from pathlib import Path

import pytest

from tests.distributed import run_command, running_command
from tests.namespaces import ADDRESSES, INTERFACES, Host, hosts  # noqa: F401 (pytest finds the fixture by its name)

LONGTRAIN = [sys.executable, "-P", "-m", "longtrain", "train"]
LIMIT = 150.0  # seconds for a run of a few steps, on a busy machine
RECIPE = """\
defaults: [base, _self_]
data: {length: 128}
model: {width: 32, depth: 2}
layers: {pattern: [gla, softmax], mixers: {gla: {heads: 2}, softmax: {heads: 2}}}
trainer: {steps: 3, evaluate_sequences: 1}
parallel: {sequence: 2}
launch: {processes: 2, device: cpu}
"""


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two processes on one host."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "recipe.yaml").write_text(RECIPE)
    ended = run_command([*LONGTRAIN, "recipe.yaml", "run_dir=run"], cwd=folder, timeout=LIMIT)
    assert ended.returncode == 0, ended.stdout
    return losses(folder / "run")


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_recipe_trains_across_two_hosts(
    launcher: str,
    hosts: tuple[Host, Host],  # noqa: F811
    alone: list[float],
    tmp_path: Path,
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    words = [*LONGTRAIN, "recipe.yaml", f"launch.launcher={launcher}", "launch.hostfile=hosts", "run_dir=run"]
    with contextlib.ExitStack() as stack:
        started = []
        for rank, (host, interface) in enumerate(zip(hosts, INTERFACES, strict=True)):
            environment = {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
            command = [*host.enter, *words, f"launch.node_rank={rank}"]
            output = tmp_path / f"host-{rank}"
            started.append(stack.enter_context(running_command(command, output=output, cwd=tmp_path, env=environment)))
        codes = [process.wait(LIMIT) for process in started]
        said = "\n".join((tmp_path / f"host-{rank}").read_text(errors="replace") for rank in range(2))
        assert codes == [0, 0], said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-6)
