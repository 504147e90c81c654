"""`longtrain bench kernels`: floors by independent numbers, no times of what is wrong, and every part runs."""

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain import kernels
from longtrain.bench_kernels import __main__ as worker
from longtrain.bench_kernels import parts_cpu, parts_gpu, roofline
from longtrain.bench_kernels.bench import Bar, Bench, Comparison, Expected
from longtrain.bench_kernels.report import Report, Row
from longtrain.bench_kernels.roofline import CARDS, Card, Step, Work
from longtrain.bench_kernels.sides import Disagreement, Side, check
from longtrain.bench_kernels.timing import Times, in_turn, peak_bytes
from longtrain.cli import main
from longtrain.kernels.linear_cross_entropy import torch_impl
from longtrain.launch import benchmark_kernels

CPU = torch.device("cpu")
A100, H100, H200, B200 = CARDS
WIDE = {"batch": 1, "tokens": 131_072, "heads": 32, "key_width": 128, "value_width": 128}


def test_floors_of_a_fixed_decay():
    """The published count: 4.29 GB and 7.52 GB, 0.89 + 1.57 ms at 4.8 TB/s; two sweeps backward move 10.7 GB."""
    forward, backward = roofline.linear(**WIDE, decay="head")
    assert forward.least.bytes / 1e9 == pytest.approx(4.29, abs=0.01)
    assert backward.least.bytes / 1e9 == pytest.approx(7.52, abs=0.01)
    assert 1e3 * forward.floor(H200) == pytest.approx(0.89, abs=0.01)
    assert 1e3 * backward.floor(H200) == pytest.approx(1.57, abs=0.01)
    assert 1e3 * forward.floor(H100) == pytest.approx(1.28, abs=0.01)
    assert 1e3 * backward.floor(H100) == pytest.approx(2.24, abs=0.01)
    sweeps = [step.bytes for step in backward.design if step.name != "states of parts"]
    assert sum(sweeps) / 1e9 == pytest.approx(10.7, abs=0.05)


def test_floors_of_the_others():
    # Causal, T 8192: 8192 * 8193 / 2 pairs in 32 heads, 4 operations for each of 128 channels; 2.5 x that backward.
    pairs = 8192 * 8193 // 2 * 32
    forward, backward = roofline.softmax(roofline.causal(8192), "causal", **parts_gpu._SHAPE)
    assert forward.least.flops == pairs * 512 and backward.least.flops == pairs * 1280
    assert 1e3 * forward.floor(H200) == pytest.approx(0.556, abs=0.001)
    products = [step.flops for step in backward.design]
    assert sum(products) == pytest.approx(pairs * 7 * 256, rel=0.02)
    head, channel = (roofline.linear(**WIDE, decay=decay) for decay in ("head", "channel"))
    one = 131_072 * 32 * 128 * 2
    assert channel[0].least.bytes - head[0].least.bytes == one  # the decays, read
    assert channel[1].least.bytes - head[1].least.bytes == 2 * one  # and their gradients
    delta = roofline.delta_rule(**WIDE)
    assert delta[0].least.bytes == 4 * one + 131_072 * 32 * 8
    slots = roofline.slot_attention(batch=1, tokens=131_072, heads=32, width=128, slots=64)
    assert slots[0].least.bytes == 5 * one
    convolved = roofline.convolution(batch=1, tokens=131_072, width=4096, taps=4)
    assert [work.least.bytes for work in convolved] == [2 * one, 3 * one]
    # 32,768 x 131,072 logits of 8,192 operations: 35 TFLOP, and two more such products backward.
    losses = roofline.cross_entropy(tokens=32_768, width=4096, vocabulary=131_072)
    assert [work.least.flops / 1e12 for work in losses] == pytest.approx([35.18, 70.37], abs=0.01)
    assert sum(step.flops for work in losses for step in work.design) == pytest.approx(4 * losses[0].least.flops)
    # What the design's order costs beside its products stays below the bar of 15 % at 7 tenths of the peak.
    card = Card("slower", 0.7 * H200.flops, H200.bandwidth, "")
    assert sum(work.reachable(card) for work in losses) <= 1.15 * 4 * losses[0].floor(card)


def test_a_step_takes_the_longer_and_steps_add_up():
    card = Card("simple", flops=100.0, bandwidth=10.0, source="")
    work = Work("x", "y", "forward", Step("all", 100, 1), (Step("a", 100, 50), Step("b", 300, 1)))
    assert work.floor(card) == 1.0 and work.reachable(card) == 8.0


@pytest.mark.parametrize("documents", [(), (300, 1, 100), (5,) * 40])
@pytest.mark.parametrize("window", [None, 70])
def test_tiles_are_counted_as_they_are(documents, window):
    intervals = roofline.causal(401 if not documents else sum(documents), documents=documents, window=window)
    tokens = intervals.lo.size
    key = np.arange(tokens)
    seen = (intervals.lo[:, None] <= key) & (key < intervals.hi[:, None])
    position = np.arange(tokens)
    document = np.searchsorted(np.cumsum(documents or (tokens,)), position, side="right")
    wanted = (document[:, None] == document) & (position[:, None] >= position)
    if window is not None:
        wanted &= position[:, None] - position <= window
    assert (seen == wanted).all()
    size = -(-tokens // 128) * 128
    padded = np.zeros((size, size), dtype=bool)
    padded[:tokens, :tokens] = seen
    blocks = padded.reshape(size // 128, 128, size // 128, 128).any((1, 3)).sum()
    assert blocks * 128 * 128 <= roofline.tiled_area(intervals) <= (blocks + size // 128 * 2) * 128 * 128
    if not documents:
        assert roofline.tiled_area(intervals) == blocks * 128 * 128


def test_no_design_is_below_its_floor():
    for work in roofline.works():
        assert sum(step.flops for step in work.design) >= work.least.flops, work
        assert sum(step.bytes for step in work.design) >= work.least.bytes, work
        for card in CARDS:
            assert 0 < work.floor(card) <= work.reachable(card) < 20 * work.floor(card), work


def test_roofline_is_written_as_committed(capsys, tmp_path: Path):
    assert worker.main(["--device=cpu", "--repeats=1", "--threads=1", "--roofline", f"--write={tmp_path}"]) == 0
    text = (tmp_path / "kernels_roofline.md").read_text()
    assert text == capsys.readouterr().out
    committed = Path(__file__).parents[2] / "docs" / "benchmarks" / "kernels_roofline.md"
    assert committed.read_text() == text, "write it again: longtrain bench kernels --roofline --write docs/benchmarks"


def test_parts_on_a_cpu(capsys, tmp_path: Path):
    arguments = ["--device=cpu", "--repeats=2", "--threads=1", "--shrink=64", f"--write={tmp_path}"]
    assert worker.main(arguments) == 0
    shown = capsys.readouterr().out
    markdown, record = ((tmp_path / f"kernels_cpu.{kind}").read_text() for kind in ("md", "json"))
    for text in (shown, markdown):
        assert "cores" in text and re.search(r"torch \d", text) and "2 samples each after one run of warm-up" in text
        for part in parts_cpu.PARTS:
            assert part in text
    assert re.search(r"\| fixed decay, B 1, T 1024, .* \| softmax \(SDPA\) \| both \| [\d.]+ s \|", markdown)
    rows = json.loads(record)["rows"]
    assert {row["part"] for row in rows} == set(parts_cpu.PARTS)
    ours = [row for row in rows if row["side"] == "longtrain" and row["samples"]]
    assert len(ours) == 6 and all(0 < row["error"] < 1e-4 and len(row["samples"]) == 2 for row in ours)
    assert all(row["met"] in (True, False) for row in rows if row["bar"])
    assert {row["bar"] for row in rows} == {"", ">= 20 x", "<= 1.15 x"}


def test_parts_of_a_gpu_run(capsys):
    """Tiny, on this CPU: which sides there are depends on the device, nothing else does."""
    report = Report(CPU, "longtrain bench kernels", repeats=1)
    for name in ("softmax", "packed", "linear", "lengths", "delta", "slots", "cross-entropy"):
        parts_gpu.PARTS[name](Bench(report, repeats=1, shrink=2048))
    assert {row.part for row in report.rows} >= {"softmax", "packed", "linear", "lengths", "delta", "cross-entropy"}
    assert all(row.error is None or row.error < 2e-2 for row in report.rows)
    assert {row.bar for row in report.rows if row.part == "cross-entropy"} == {"", ">= 0.869565 x", "<= 1.5 GB"}


def test_what_is_wrong_is_not_timed(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    right = kernels.causal_conv1d

    def wrong(x: Tensor, weight: Tensor, activation: Literal["silu"] | None = None, backend: str = "auto") -> Tensor:
        return right(x, weight, activation=activation, backend=backend) * (1 if backend == "reference" else 1.001)

    monkeypatch.setattr(kernels, "causal_conv1d", wrong)
    assert worker.measure(CPU, ["conv"], 1, write=tmp_path, shrink=64) == 1
    shown = capsys.readouterr()
    assert re.search(
        r"longtrain: conv, .*, longtrain: relative errors 1.0e-03, .* more than 2.4e-05.*: no compar", shown.err
    )
    assert " both " not in shown.out and not list(tmp_path.iterdir())
    one = torch.ones(3)
    with pytest.raises(Disagreement, match="nan"):
        check("this", [one * torch.nan], [one], dtype=torch.float32)
    with pytest.raises(Disagreement):
        check("this", [one, one], [one, one * 1.01], dtype=torch.float32)


def test_a_rival_that_cannot_run_is_told(capsys):
    bench = Bench(Report(CPU, "longtrain bench kernels", repeats=1), repeats=1)

    def missing(x: Tensor) -> Tensor:
        raise ModuleNotFoundError("No module named 'fla'")

    x = torch.ones(3, requires_grad=True)
    sides = bench.rival("fla", lambda: Side(missing, (x,), x.detach()))
    sides |= bench.rival("mine", lambda: Side(torch.sin, (x,), x.detach()))
    assert list(sides) == ["mine"]
    (note,) = bench.report.notes
    assert note == "fla: ModuleNotFoundError: No module named 'fla': no comparison with it, no bar judged by it"
    assert note in capsys.readouterr().out


def test_a_part_that_fails_leaves_the_others(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def broken(bench: Bench) -> None:
        raise RuntimeError("out of memory")

    def whole(bench: Bench) -> None:
        bench.report.add(Row("whole", "case", "longtrain", "both", 1.0, "ms"))

    monkeypatch.setattr(parts_cpu, "PARTS", {"broken": broken, "whole": whole})
    assert worker.measure(CPU, None, 1, write=tmp_path) == 1
    assert "out of memory" in capsys.readouterr().err
    markdown = (tmp_path / "kernels_cpu.md").read_text()
    assert "- broken ended with RuntimeError: out of memory" in markdown and "| case | longtrain | both |" in markdown


def test_predictions_stand_beside_what_came_out():
    bench = Bench(Report(CPU, "longtrain bench kernels", repeats=1), repeats=1)
    this = Comparison("linear", "case", {}, {"longtrain": Bar()}, {"forward": Expected(1e-3, 3e-3)})
    bench.rows(this, {"longtrain": Times((4e-3,)), "fla": Times((8e-3,))}, "forward")
    ours, theirs = bench.report.rows
    assert ours.floor == theirs.floor == 1.0 and ours.predicted == 3.0 and theirs.predicted is None
    assert "| case | longtrain | forward | 4 ms | 3 ms | 0.25 | 2.00 |" in bench.report.markdown()


def test_sides_take_turns():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = in_turn(sides, CPU, repeats=3, warm_up=1)
    assert calls == ["a", "b", *"ab" * 3] and all(len(one.samples) == 3 for one in times.values())


def test_memory_is_counted_inside_operators():
    """Whole logits are seen, and the tiled loss holds a tile (two where its halves differ) beside its gradients."""
    tokens, width, vocabulary = 1024, 32, 4096
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))

    def tiled() -> tuple[Tensor, ...]:
        return torch.autograd.grad(kernels.linear_cross_entropy(hidden, weight, targets), (hidden, weight))

    def whole() -> tuple[Tensor, ...]:
        return torch.autograd.grad(torch.nn.functional.cross_entropy(hidden @ weight.t(), targets), (hidden, weight))

    gradients = 4 * width * (tokens + vocabulary)
    tile = 4 * torch_impl._CPU_TILE[0] * torch_impl._CPU_TILE[1]
    assert peak_bytes(whole, CPU) >= 2 * 4 * tokens * vocabulary
    assert peak_bytes(tiled, CPU) <= gradients + 1.5 * tile + 100 * tokens


def test_resources_become_a_table():
    pytest.importorskip("triton")
    text = worker.compile_all(["linear_cross_entropy"], ["sm_90"], full=False)
    assert "| linear_cross_entropy sum_up: bf16 | sm_90 |" in text and "227 KiB (sm_90)" in text


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--repeats", "0", "1 or more"),
        ("--only", "linear,speed", "linear, delta, conv, cross-entropy"),
        ("--only", "softmax", "on a CPU names out of"),
        ("--device", "tpu", "cpu or gpu"),
        ("--write", "nowhere", "a folder that exists"),
    ],
)
def test_refuses_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch, option: str, value: str, says: str):
    monkeypatch.setattr(benchmark_kernels, "run", lambda chosen: pytest.fail("started"))
    assert main(["bench", "kernels", "--device=cpu", f"{option}={value}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith(f"longtrain: {option}: got ") and says in shown


def test_the_command_starts_the_measuring_process(capfd, tmp_path: Path):
    assert main(["bench", "kernels", "--device=cpu", "--roofline", f"--write={tmp_path}"]) == 0
    assert "# Floors of the kernels" in capfd.readouterr().out and (tmp_path / "kernels_roofline.md").exists()
    assert main(["bench", "kernels", "--resources", "--roofline"]) == 2


def test_parts_are_the_workers():
    assert benchmark_kernels.ON_CPU == tuple(parts_cpu.PARTS) and benchmark_kernels.ON_GPU == tuple(parts_gpu.PARTS)
