"""`longtrain train linearise_*`: what is refused when the recipe is read, and one run from end to end."""

import json
import shutil
from pathlib import Path

import pytest

from longtrain import generation
from longtrain.config import compose, read_run
from longtrain.errors import UsageError
from longtrain.evaluation import evaluate
from longtrain.layers.pattern import LayersConfig, named_layers
from longtrain.linearisation.source import Source, differing
from longtrain.model import ModelConfig
from longtrain.train import train
from tests.distributed import run_distributed
from tests.linearisation.runs import overrides, processes_of, settings, trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs as a recipe's check sees them: settings, and that there is a checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    for name, more in (
        ("softmax", []),
        ("normed", ["layers.mixers.softmax.qk_norm=true"]),
        ("hybrid", ["layers.pattern=[lightning, softmax]"]),
        ("recall", ["data=mqar", "data.path=null", "data.vocabulary=64", "data.pairs=4"]),
    ):
        settings(folder / name, more)
        (folder / name / "checkpoints/step-00000002").mkdir(parents=True)
    settings(folder / "untrained")
    (folder / "empty").mkdir()
    return folder


REFUSED = [
    ("gsa", "nowhere", [], ("linearise.from: there is no run", "nowhere")),
    ("gsa", "softmax/config.yaml", [], ("linearise.from: there is no run", "a file, not a folder")),
    ("gsa", "empty", [], ("linearise.from: ", "is not the folder of a run")),
    ("gsa", "untrained", [], ("linearise.from: ", "no checkpoint yet")),
    ("gsa", "softmax", ["linearise.from=null"], ("linearise.from: got null", "linearise.from=RUN would work")),
    ("gsa", "softmax", ["linearise.from=''"], ("linearise.from: got an empty name",)),
    ("gsa", "softmax", ["linearise.form=x"], ("linearise.form", "'linearise.from'")),
    ("gsa", "hybrid", [], ("layers.pattern: got gsa", "has lightning in layer 0", "lightning with its options")),
    ("lizard", "normed", [], ("layers.pattern: got lizard", "no place for k_norm.weight, q_norm.weight")),
    ("gsa", "softmax", ["layers.pattern=mamba2"], ("layers.pattern: got mamba2", "gsa, lizard, sliding_window would")),
    ("gsa", "softmax", ["layers.mixers.gsa.heads=2"], ("layers.mixers.gsa.heads: got 2", "gsa.heads=4 would work")),
    ("gsa", "softmax", ["layers.mixers.gsa.kv_heads=null"], ("layers.mixers.gsa.kv_heads: got 4", "kv_heads=2 would")),
    ("lizard", "softmax", ["layers.mixers.lizard.rope_base=9"], ("lizard.rope_base: got 9", "rope_base=10000.0 would")),
    ("gsa", "softmax", ["model.width=64"], ("model.width: got 64", "model.width=32 would work")),
    ("gsa", "softmax", ["model.depth=3"], ("model.depth: got 3", "model.depth=2 would work")),
    ("gsa", "softmax", ["model.mlp_width=96"], ("model.mlp_width: got 96", "model.mlp_width=64 would work")),
    ("gsa", "softmax", ["model.tie_embedding=true"], ("model.tie_embedding: got True", "tie_embedding=false would")),
    ("gsa", "softmax", ["model.vocabulary=300"], ("model.vocabulary: got 300", "257", "data of that run would")),
    ("gsa", "recall", [], ("model.vocabulary: got 257", "has 64")),
    ("gsa", "softmax", ["linearise.match_steps=7"], ("linearise.match_steps: got 7", "trainer.steps = 6")),
    ("gsa", "softmax", ["linearise.match_steps=-1"], ("linearise.match_steps: got -1",)),
    ("gsa", "softmax", ["linearise.match_rate=0"], ("linearise.match_rate: got 0", "above 0")),
    ("gsa", "softmax", ["engine=deepspeed"], ("engine: got 'deepspeed'", "engine=fsdp would work")),
    (
        "gsa",
        "softmax",
        ["layers.pattern=softmax", "layers.mixers.softmax.heads=4", "layers.mixers.softmax.kv_heads=2"],
        ("layers.pattern: got the layers of", "nothing to match", "linearise.match_steps=0"),
    ),
]


@pytest.mark.parametrize(("name", "run", "words", "parts"), REFUSED)
def test_refused_in_one_line(name: str, run: str, words: list[str], parts: tuple[str, ...], runs: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        compose(f"linearise_{name}", overrides(name, runs / run, *words))
    message = str(refusal.value)
    assert message.startswith(parts[0]) or parts[0] in message
    assert all(part in message for part in parts) and "\n" not in message, message


def ran(rank: int, world: int, words: list[str]) -> str:
    """What `longtrain train linearise_gsa` does in a process; what it refused, or nothing."""
    try:
        recipe = compose("linearise_gsa", words)
        train(recipe, processes_of(recipe, rank, world))
    except UsageError as error:
        return str(error)
    return ""


def trains(*words: str) -> str:
    return run_distributed(1, ran, ["launch.processes=1", *words], timeout=240)[0]


def evaluated(rank: int, world: int, run_dir: Path) -> tuple[float, int]:
    recipe = read_run(run_dir)
    evaluation, step = evaluate(recipe, processes_of(recipe, rank, world), run_dir, 1)
    return evaluation.loss, step


def evaluates(run_dir: Path) -> tuple[float, int]:
    return run_distributed(1, evaluated, run_dir, timeout=240)[0]


def records(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_one_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, away, run_dir = tmp_path / "source", tmp_path / "away", tmp_path / "run"
    run_distributed(1, trained, source, timeout=240)
    words = overrides("gsa", source, f"run_dir={run_dir}", "trainer.checkpoint_every=1", "trainer.keep_checkpoints=9")
    assert trains(*words) == ""
    whole = records(run_dir)
    assert [record.get("objective") for record in whole] == ["match"] * 3 + [None] * 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["match_steps"], summary["match_loss"]) == (3, whole[2]["loss"])
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 256)
    assert evaluates(run_dir) == (summary["held_out_loss"], 6)
    assert generation.main([str(run_dir), "--prompt", "def ", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    # In the first stage it takes the trained run, in the second it needs it no longer.
    for step in (2, 3, 5):
        for path in (run_dir / "checkpoints").glob("step-*"):
            if int(path.name.removeprefix("step-")) > step:
                shutil.rmtree(path)
        if step == 2:
            assert evaluates(run_dir)[1] == 2
            source.rename(away)
            assert trains(f"resume={run_dir}").startswith(f"linearise.from: there is no run {source}")
            away.rename(source)
        elif step == 3:
            source.rename(away)
        assert trains(f"resume={run_dir}") == ""
        assert [record["loss"] for record in records(run_dir)] == [record["loss"] for record in whole]
        assert json.loads((run_dir / "summary.json").read_text())["match_loss"] == whole[2]["loss"]
    for word, kept in (("linearise.match_steps=5", "3"), ("linearise.from=elsewhere", f"'{source}'")):
        refused = trains(f"resume={run_dir}", word)
        assert refused.startswith(word.split("=")[0]) and f"which has {kept} and keeps it" in refused
    next((away / "checkpoints").glob("*/*.safetensors")).unlink()
    refused = trains(*overrides("gsa", away, f"run_dir={tmp_path / 'other'}"))
    assert refused.startswith("linearise.from: the checkpoint is damaged: ") and "remove" not in refused
    assert refused.endswith("; a run whose checkpoint is whole would work")


def test_how_states_cross_ranks_makes_no_other_mixer() -> None:
    ours, theirs = (
        named_layers(LayersConfig(pattern="hymba", mixers={"hymba": options}), width=32, depth=2)
        for options in ({"scan_strategy": "chain"}, {})
    )
    source = Source(Path("checkpoint"), Path("run"), ModelConfig(), tuple(theirs), 257)
    assert differing(source, ours) == []
    other = named_layers(LayersConfig(pattern="hymba", mixers={"hymba": {"state_width": 8}}), width=32, depth=2)
    assert differing(source, other) == [0, 1]
