"""`longtrain plan` as a user calls it."""

import pytest

from longtrain.cli import main
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "8xh20"], "longtrain: --devices: no 'h20' (nearest: 'h200')"),
        (["--devices", "h200", "--longest", "--search"], "longtrain: --longest: got it with --search"),
        (
            ["--devices", "h200", "--dry-run", "engine=deepspeed"],
            "longtrain: engine: got 'deepspeed', dry runs know 'fsdp'",
        ),
        (["--devices", "h200", "model.vocabulary=100"], "longtrain: model.vocabulary: got 100, the data has 257"),
    ],
)
def test_what_cannot_be_planned_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "quickstart", *words]) == 2
    assert message in capsys.readouterr().err
