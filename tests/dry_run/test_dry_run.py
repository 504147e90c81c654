"""Dry runs against the same steps with real numbers, and against what is known of a large model."""

from pathlib import Path

import pytest

from longtrain.config import compose
from longtrain.dry_run import TERMS, Held
from longtrain.dry_run.step import run
from longtrain.errors import UsageError
from longtrain.launch.dry_runs import dry_run

GIB = 2**30
LLAMA_8B = """\
defaults:
  - base
  - override data: copy
  - _self_
model: {width: 4096, depth: 32, mlp_width: 14336, tie_embedding: false}
layers: {pattern: softmax, mixers: {softmax: {heads: 32, kv_heads: 8, rope_base: 500000.0}}}
data: {length: 131072, vocabulary: 128256, items: 1000, selective: false}
trainer: {precision: bfloat16}
memory: {recompute: full}
"""
# Weights of a block: q and out, k and v, gate and up and down, two norms; then embedding, head and the last norm.
LLAMA_8B_WEIGHTS = 32 * (4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096) + (2 * 128256 + 1) * 4096


@pytest.fixture
def llama_8b(tmp_path: Path) -> str:
    path = tmp_path / "llama.yaml"
    path.write_text(LLAMA_8B, encoding="utf-8")
    return str(path)


def differences(one: Held, other: Held) -> dict[str, float]:
    """By term, over what `other` says, of those above 100 KB."""
    return {t: one.peak[t] / other.peak[t] - 1 for t in (*TERMS, "total") if other.peak[t] > 1e5}


def test_the_quickstart_holds_what_it_holds_with_real_numbers():
    here = {"world": 1, "architecture": None}
    overrides = ["launch.processes=1", "data.length=2048"]
    dry, real = dry_run("quickstart", overrides, **here), dry_run("quickstart", overrides, **here, real=True)
    off = differences(dry, real)
    assert set(off) >= {"weights", "optimizer", "layer inputs", "kept attention", "gathered weights", "working set"}
    assert max(map(abs, off.values())) < 0.01, off
    assert dry.after["total"] == pytest.approx(real.after["total"], rel=0.02)
    assert dry.tokens == real.tokens == 2048


@pytest.mark.parametrize("stage", [3] + [pytest.param(stage, marks=pytest.mark.full) for stage in (0, 1, 2)])
def test_deepspeed_holds_what_it_holds_with_real_numbers(stage: int):
    here = {"world": 1, "architecture": None}
    overrides = ["launch.processes=1", "data.length=1024", "model.width=256", "engine=deepspeed"]
    overrides += [f"deepspeed.stage={stage}", "layers.pattern=softmax"]
    dry, real = dry_run("quickstart", overrides, **here), dry_run("quickstart", overrides, **here, real=True)
    off = differences(dry, real)
    assert set(off) >= {"weights", "optimizer", "layer inputs", "working set"}
    assert max(map(abs, off.values())) < 0.01, off
    assert dry.building["total"] == pytest.approx(real.building["total"], rel=0.01)


def test_a_large_model_on_one_pretended_card(llama_8b: str):
    held = dry_run(llama_8b, world=1, architecture="sm_90")
    assert held.tokens == 131072
    assert held.peak["weights"] == held.after["weights"] == 4 * LLAMA_8B_WEIGHTS
    assert held.after["optimizer"] == pytest.approx(8 * LLAMA_8B_WEIGHTS, abs=1e4)  # and step counts
    assert held.peak["layer inputs"] in [n * 131072 * 4096 * 2 for n in (31, 32)]  # as backward begins
    assert held.after["total"] == pytest.approx(12 * LLAMA_8B_WEIGHTS, rel=1e-3)
    assert held.seconds < 60 * 5  # under 60 on a machine with nothing else to do


@pytest.mark.full
def test_a_large_model_over_eight_pretended_cards(llama_8b: str):
    held = dry_run(llama_8b, ["data.length=1048576"], world=8, architecture="sm_90")
    assert held.tokens == 131072
    assert held.after["weights"] == pytest.approx(4 * LLAMA_8B_WEIGHTS / 8, rel=1e-3)
    assert held.peak["layer inputs"] == 32 * 131072 * 4096 * 2
    assert held.peak["optimizer"] == held.after["optimizer"]


def test_work_on_shapes_of_whole_tensors_is_no_memory():
    """DTensor's, in the optimizer above all: with few tokens a step would seem to hold most there."""
    held = dry_run("quickstart", ["data.length=256"], world=8, architecture="sm_90")
    assert held.peak["optimizer"] == held.after["optimizer"]


def test_what_a_dry_run_cannot_do_is_refused():
    with pytest.raises(UsageError, match="trainer.steps: got 0, expected 1 or more"):
        dry_run("quickstart", ["trainer.steps=0"], world=2, architecture="sm_90")
    recipe = compose("quickstart")
    with pytest.raises(UsageError, match=r"--rank: got 2 of --world 2, expected 0 to 1"):
        run(recipe, world=2, rank=2, architecture="sm_90")
    with pytest.raises(UsageError, match=r"--architecture: got 'sm_89', expected one of sm_80"):
        run(recipe, world=2, architecture="sm_89")
    with pytest.raises(UsageError, match=r"--real: got a world of 2"):
        run(recipe, world=2, architecture=None, real=True)
