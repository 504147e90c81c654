"""The README's worked examples, run as they stand there."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import longtrain
from longtrain.layers import LayerPlace
from longtrain.parallel import SequenceShard
from tests.distributed import run_command

README = Path(__file__).resolve().parent.parent / "README.md"
TRAIN = [sys.executable, "-P", "-m", "longtrain", "train"]


def block(heading: str, language: str) -> str:
    """The first block of code in a language under a heading."""
    return blocks(heading, language)[0]


def blocks(heading: str, language: str) -> list[str]:
    """All blocks of code in a language under a heading."""
    section = README.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, (heading, language)
    return found


@pytest.mark.parametrize("processes", [1, 3])
def test_the_model_of_ones_own_prints_the_same_on_any_number_of_processes(tmp_path: Path, processes: int) -> None:
    (tmp_path / "example.py").write_text(block("In a model of your own", "python"))
    promised = re.search(r"# (loss .*)", block("In a model of your own", "bash"))
    assert promised is not None
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ended = run_command([*command, "example.py"], cwd=tmp_path, timeout=120, env={"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout
    printed = re.search(r"loss .*", ended.stdout)
    assert printed is not None, ended.stdout
    numbers = [[float(number) for number in re.findall(r"[\d.]+\d", text)] for text in (printed[0], promised[1])]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-4)


def test_the_cost_model_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("How attention reaches its keys", "python"), {})
    assert capsys.readouterr().out.startswith(block("How attention reaches its keys", "text"))


def test_a_mixer_is_one_file(tmp_path: Path) -> None:
    shutil.copytree(Path(longtrain.__file__).parent, tmp_path / "longtrain")  # follows the links
    code = block("Add a mixer", "python")
    (tmp_path / "longtrain/layers/mixers/average.py").write_text(code)
    words = block("Add a mixer", "bash").split(maxsplit=2)
    assert words[:2] == ["longtrain", "train"]
    overrides = ["layers.pattern=[average, softmax]", "trainer.steps=2"]
    assert all(override in words[2] for override in overrides)
    small = ["data.length=256", "trainer.evaluate_sequences=1", f"run_dir={tmp_path / 'run'}"]
    run = run_command(
        [*TRAIN, "quickstart", *overrides, *small], cwd=tmp_path, timeout=120, env={"PYTHONPATH": str(tmp_path)}
    )
    assert run.returncode == 0, run.stdout
    assert (tmp_path / "run/summary.json").exists()


def test_the_mixers_reference_is_the_mixer() -> None:
    names: dict = {}
    exec(block("Add a mixer", "python"), names)
    exec(blocks("Add a mixer", "python")[1], names)
    torch.manual_seed(0)
    for options in names["CASES"]:
        mixer = names["AverageMixer"](names["AverageConfig"](**options), LayerPlace(width=32, index=0, depth=1))
        x = torch.randn(1, 20, 32)
        found, wanted = mixer(x, SequenceShard(length=20))[0], names["reference"](mixer, x[0])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_layout_is_one_class() -> None:
    names: dict = {}
    exec(block("Add a layout", "python"), names)
    layout = names["LastFirst"]()
    held = [SequenceShard.pretend(10, rank=rank, world=3, layout=layout).positions.tolist() for rank in range(3)]
    assert held == [[6, 7, 8, 9], [3, 4, 5], [0, 1, 2]]
    assert names["shard"].positions.tolist() == list(range(10))


def test_a_recipe_is_one_file(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(block("Add a recipe", "yaml"))
    small = ["trainer.evaluate_sequences=1", "run_dir=run"]
    run = run_command([*TRAIN, "long.yaml", *small], cwd=tmp_path, timeout=180)
    assert run.returncode == 0, run.stdout
    assert (tmp_path / "run/summary.json").exists()


def test_the_refusal_is_what_the_readme_shows(tmp_path: Path) -> None:
    shown = block("Add a recipe", "text").strip().splitlines()
    assert shown[0].startswith("$ longtrain train ")
    run = run_command([*TRAIN, *shown[0].split()[3:]], cwd=tmp_path, timeout=120)
    assert (run.returncode, run.stdout.strip()) == (2, shown[1])
    assert list(tmp_path.iterdir()) == []
