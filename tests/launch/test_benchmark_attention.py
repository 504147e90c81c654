"""`longtrain bench attention`: every part says what it must, no number before the same results, memory is bounded."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from longtrain.bench_attention.cases import NAMES, Case, inputs, squares
from longtrain.bench_attention.memory import peak_bytes
from longtrain.bench_attention.sides import Longtrain, Single
from longtrain.bench_attention.virtual import critical_path
from longtrain.bench_common.comparing import deviations
from longtrain.cli import main
from longtrain.launch import attention_options, benchmark_attention
from longtrain.launch.benchmark_attention import Disagreement, check_agreement
from longtrain.launch.team import Team
from longtrain.parallel.attention import STRATEGIES
from tests.distributed import run_distributed

CPU = torch.device("cpu")
BENCH = ["bench", "attention", "--device=cpu"]
TINY = [*BENCH, "--length=256", "--heads=4", "--kv-heads=2", "--width=8", "--repeats=1"]


def test_scaling_packed_and_rival(capsys, tmp_path: Path):
    file = tmp_path / "attention.md"
    assert main([*TINY, "--only=scaling,packed,rival", "--strategy=ring,mesh", f"--output={file}"]) == 0
    shown, written = capsys.readouterr().out, file.read_text()
    for text in (shown, written):
        assert "B 1, T 256, H 4, G 2, K 8, float32" in text
        assert "2 processes x" in text and "1 times each after one run of warm-up" in text
        assert re.search(r"torch \d", text) and "cores" in text
        assert re.search(r"\| longtrain +\| zigzag +\| ring +\| \d+\.\d{3} +\| \d+\.\d{3} +\| >= 0.95 \|", text)
        assert re.search(r"\| longtrain +\| striped +\| mesh +\| \d+\.\d{3} +\| \d+\.\d{3} +\| >= 0.95 \|", text)
        assert re.search(r"\| longtrain +\| contiguous +\| ring +\| \d+\.\d{3} +\| \d+\.\d{3} +\| +\|", text)
        assert "Lengths 94, 62, 39, 24, 15, 10, 6, 4, 2: 7,707 visible pairs" in text and "The ideal is" in text
        assert re.search(r"\| longtrain +\| balanced +\| ring +\| \d+\.\d{3} +\| \d+\.\d{3} +\| >= 0.8 +\|", text)
        assert re.search(r"x faster +\| >= 3|ring-attention-pytorch is not installed", text)
    assert re.search(r"the cost model takes (zigzag|balanced) for zigzag and \w+ for contiguous", text)
    for side in ("one zigzag ring", "one contiguous mesh", "packed balanced ring", "packed zigzag to balanced ring"):
        assert re.search(rf"{side}: deviates from SDPA by out \d\.\de-\d\d, dq", shown)
    # Every run that is timed comes after the checks of its part.
    assert shown.index("packed contiguous mesh: deviates") < shown.index("  1. SDPA by document")


def test_memory_and_virtual(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark_attention, "WORLDS", (1, 2))  # fewer processes to start
    monkeypatch.setattr(benchmark_attention, "GROWING_WORLDS", (2,))
    assert main([*TINY, "--only=memory", "--virtual=4"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| 1 +\| 128 +\| \d+\.\d\d +\| 1\.000 +\|", shown)
    assert re.search(r"\| 2 +\| 64 +\| \d+\.\d\d +\| 0\.\d{3} +\|", shown)
    assert re.search(r"\| 2 +\| 32 +\| \d+\.\d\d +\| 1\.000 +\|", shown)
    assert "The critical path of 4 ranks" in shown
    assert re.search(r"\| contiguous +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| [\d.]+ +\| 1\.\d{3} +\|", shown)


def test_says_no_number_where_results_differ(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(benchmark_attention, "BUDGET", 0.01)
    assert main([*TINY, "--only=scaling", f"--output={tmp_path / 'file'}"]) == 1
    shown = capsys.readouterr()
    assert re.search(
        r"one zigzag ring differs from SDPA in out by \d\.\de-\d\d, more than .*: no comparison", shown.err
    )
    assert not re.search(r"  1\. ", shown.out) and not (tmp_path / "file").exists()


def test_a_wrong_result_is_seen():
    case = Case(64, 4, 2, 8, "float32", documents=(40, 24))
    right = Single(case, device=CPU)
    results, losses = right.run(), right.losses(right.run())
    assert all(0 < loss < 1e-6 for loss in losses.values())
    mine = Longtrain(case, layout="zigzag", strategy="ring", group=None, device=CPU).run()
    allowed = {name: 4 * loss for name, loss in losses.items()}
    check_agreement("this", deviations(squares(mine, results)), allowed)
    for place, name in enumerate(NAMES):
        wrong = [x.clone() for x in mine]
        wrong[place][0, 5] *= 1.01
        with pytest.raises(Disagreement, match=f"differs from SDPA in {name} by"):
            check_agreement("this", deviations(squares(tuple(wrong), results)), allowed)
    wrong = [x * math.nan for x in mine]
    with pytest.raises(Disagreement, match="out by nan, more than .*; dq by nan"):
        check_agreement("this", deviations(squares(tuple(wrong), results)), allowed)


def test_the_sides_have_the_same_inputs():
    case = Case(32, 4, 2, 8, "float32")
    whole = inputs(case, torch.arange(32), CPU)
    part = inputs(case, torch.tensor([3, 30]), CPU)
    assert [x.shape[2] for x in whole] == [4, 2, 2, 4]
    assert all(torch.equal(x[:, [3, 30]], y) for x, y in zip(whole, part, strict=True))


def peak(rank: int, world: int, tokens: int, layout: str) -> int:
    case = Case(tokens, 16, 2, 64, "float32")
    group = dist.group.WORLD if world > 1 else None
    return peak_bytes(case, layout=layout, strategy="ring", group=group, device=CPU)


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
def test_four_ranks_hold_less_than_a_third_each(layout: str):
    """Inputs and results alone are a quarter: what comes on top is small, and the same however many ranks there are."""
    whole = peak(0, 1, 2048, layout)
    inputs_and_results = 2048 * (4 * 16 + 4 * 2) * 64 * 4  # bytes: q, dout, out, dq; k, v, dk, dv
    assert whole > 1.2 * inputs_and_results  # the workspaces inside operators and backward passes are seen
    assert max(run_distributed(4, peak, 2048, layout)) <= 0.30 * whole


def test_memory_does_not_grow_with_the_ring():
    """256 tokens each, in rings of 4 and of 8 steps (with more tokens each, from 2 steps on: see the benchmark)."""
    four, eight = (max(run_distributed(world, peak, world * 256, "striped")) for world in (4, 8))
    assert eight <= 1.01 * four


def test_virtual_ranks_show_the_layouts_balance():
    """Theory at W = 8, causal: the contiguous layout's critical path has 1.78 x the pairs of a balanced one."""
    case = Case(512, 1, 1, 8, "float32")
    paths = {
        layout: critical_path(case, layout=layout, world=8, repeats=1, device=CPU)
        for layout in ("zigzag", "striped", "contiguous")
    }
    assert paths["contiguous"]["pairs"] == pytest.approx(15 / 8, abs=0.01)
    assert paths["contiguous"]["pairs"] / paths["zigzag"]["pairs"] > 1.7
    for path in paths.values():
        assert 0 < path["even"] <= path["forward"] + path["backward"]


def test_strategies_are_the_librarys():
    assert set(attention_options.STRATEGIES) == set(STRATEGIES)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--length", "0", "128 or more"),
        ("--repeats", "0", "1 or more"),
        ("--processes", "0", "1 or more"),
        ("--kv-heads", "3", "divisor of the 8 heads"),
        ("--only", "scaling,speed", "scaling, packed, rival, memory, virtual"),
        ("--strategy", "rings", "ring, allgather, ulysses, mesh, auto"),
        ("--strategy", "ulysses", "mesh would work"),
        ("--dtype", "int8", "float32"),
        ("--virtual", "0", "1 or more"),
        ("--output", "nowhere/file.md", "a folder that exists"),
    ],
)
def test_refuses_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch, option: str, value: str, says: str):
    monkeypatch.setattr(benchmark_attention, "run", lambda chosen: pytest.fail("started"))
    assert main([*BENCH, "--processes=3", "--length=768", f"{option}={value}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith(f"longtrain: {option}: got ") and says in shown


def test_a_gpu_that_is_not_there(capsys):
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "attention", "--device=gpu"]) == 2
    assert "--device cpu would work" in capsys.readouterr().err


def test_without_the_rival(capsys, monkeypatch: pytest.MonkeyPatch):
    ask = Team.ask
    answers = {"rival": [{"version": None}]}
    monkeypatch.setattr(Team, "ask", lambda team, do, options=None: answers.get(do) or ask(team, do, options))
    assert main([*TINY, "--only=rival", "--processes=1"]) == 0
    last = capsys.readouterr().out.rstrip().splitlines()[-1]
    assert last.startswith("ring-attention-pytorch is not installed") and "pip install" in last


def test_a_failing_or_dying_worker_is_shown():
    with Team(benchmark_attention.WORKER, 1, threads=1, device="cpu") as team:
        with pytest.raises(RuntimeError, match="rank 0 of the benchmark failed in measure:\n(.*\n)*KeyError: 'nobody'"):
            team.ask("measure", {"side": "nobody"})
        team._workers[0].kill()
        with pytest.raises(RuntimeError, match="rank 0 of the benchmark died with exit code -9"):
            team.ask("forget")
