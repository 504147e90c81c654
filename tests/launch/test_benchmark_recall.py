"""`longtrain bench recall` with trainings that only pretend: what it starts, shows and refuses."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from longtrain.config import compose
from longtrain.errors import UsageError
from longtrain.launch import benchmark_recall
from longtrain.layers.pattern import layer_names

ACCURACY = {
    "recall_linear": {"2": 0.99, "8": 0.5},
    "recall_hybrid": {"2": 1.0, "8": 0.9975},
    "recall_softmax": {"2": 1.0, "8": 1.0},
}


def test_the_three_recipes_differ_in_their_layers_alone() -> None:
    linear, hybrid, softmax = (compose(name) for name in benchmark_recall.RECIPES)
    names = [layer_names(recipe.layers, recipe.model.depth) for recipe in (linear, hybrid, softmax)]
    assert set(names[0]) == {"lightning"} and set(names[2]) == {"near", "softmax"}
    assert names[1].count("softmax") < names[1].count("lightning")
    assert linear.layers.mixers == hybrid.layers.mixers == softmax.layers.mixers
    for recipe in (hybrid, softmax):
        for part in ("data", "model", "trainer", "optimizer", "schedule", "parallel"):
            assert getattr(recipe, part) == getattr(linear, part)


def test_three_trainings_and_one_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def pretend(words: list[str], env: dict[str, str]) -> SimpleNamespace:
        assert words[1:4] == ["-m", "longtrain", "train"] and words[5] == "trainer.steps=7"
        started.append(words[4])
        run_dir = Path(words[-1].removeprefix("run_dir='").removesuffix("'"))
        run_dir.mkdir()
        summary = {"held_out_accuracy_by_pairs": ACCURACY[words[4]], "train_seconds": 61.0}
        (run_dir / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", pretend)
    assert benchmark_recall.run(["trainer.steps=7"], output=tmp_path / "out") == 0
    assert started == list(benchmark_recall.RECIPES)
    assert (tmp_path / "out" / benchmark_recall.PICTURE).read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-3:] == ["2", "8", "training"]
    assert lines[2].split() == ["recall_hybrid", "100.00", "99.75", "01:01"]

    monkeypatch.setattr(subprocess, "run", lambda words, env: SimpleNamespace(returncode=3))
    assert benchmark_recall.run([], output=tmp_path / "again") == 3


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["data=copy"], r"data\.pairs: got .* with data=copy, only data=mqar"),
        (["run_dir=x"], "run_dir, resume: got one of them, expected --output"),
        (["trainer.stps=3"], "trainer.stps: no such key"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_starts(tmp_path: Path, overrides: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        benchmark_recall.run(overrides, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
