"""`longtrain plan` as a user calls it."""

import pytest

from longtrain.cli import main
from longtrain.errors import UsageError
from longtrain.planning import devices_named, plan


def test_a_plan_that_fits(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama_8b_1m", "--devices", "8xh200"]) == 0
    shown = capsys.readouterr().out
    planned = plan("llama_8b_1m", [], devices_named("8xh200"))
    assert "data 1 x sequence 8, T = 1,048,576, 131,072 tokens a device" in shown
    assert f"weights              {planned.memory.terms['weights'] / 2**30:>9.3f} GiB" in shown
    for line in ("layer inputs", "kept attention", "margin", "links, each device", "step time", "what binds"):
        assert f"\n{line}" in shown
    assert "it fits" in shown


def test_a_plan_that_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama_8b_128k", "--devices", "8xh200", "memory.recompute=none", "data.length=262144"]) == 2
    shown = capsys.readouterr().out
    assert "it does not fit: " in shown and "GiB on a device are missing" in shown
    assert "it would with memory.recompute=attention" in shown


def test_longest_and_search(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "llama_8b_1m", "--devices", "8xh200", "--longest"]) == 0
    assert "longest sequence that fits: data.length=" in capsys.readouterr().out
    assert main(["plan", "llama_8b_128k", "--devices", "2xh200", "--search"]) == 0
    assert "fastest of what fits on 2 x H200" in capsys.readouterr().out
    assert main(["plan", "llama_70b_512k", "--devices", "a100", "--longest", "parallel.rows=1"]) == 2
    assert "not even 1,024 tokens" in capsys.readouterr().err


def test_a_dry_run_of_deepspeed_is_deepspeeds_own(capsys: pytest.CaptureFixture[str]):
    words = ["quickstart", "--devices", "2xh200", "engine=deepspeed", "layers.pattern=softmax", "data.length=65536"]
    assert main(["plan", *words, "memory.recompute=full", "model.vocabulary=65536", "--dry-run"]) == 0
    lines = capsys.readouterr().out.split("dry run  ")[1].splitlines()
    rows = {line[:20].strip(): [float(word) for word in line[20:].split()] for line in lines[1:11]}
    for term in ("weights", "gradients", "optimizer", "gathered weights", "layer inputs", "total"):
        planned, held = rows[term]
        assert held == pytest.approx(planned, rel=0.05, abs=0.002) and held > 0.005, term


def test_the_longest_sequence_can_be_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def refuse(recipe: str, overrides: list[str], **others: object) -> None:
        asked.extend(overrides)
        raise UsageError("seen")

    monkeypatch.setattr("longtrain.launch.plan.dry_run", refuse)
    assert main(["plan", "llama_8b_1m", "--devices", "8xh200", "--longest", "--dry-run"]) == 2
    assert "data.length=1048576" not in asked and any(word.startswith("data.length=") for word in asked)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "8xh20"], "longtrain: --devices: no 'h20' (nearest: 'h200')"),
        (["--devices", "h200", "--longest", "--search"], "longtrain: --longest: got it with --search"),
        (["--devices", "h200", "--dry-run", "--search"], "longtrain: --dry-run: got it with --search"),
        (["--devices", "h200", "model.vocabulary=100"], "longtrain: model.vocabulary: got 100, the data has 257"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "quickstart", *words]) == 2
    assert message in capsys.readouterr().err
