"""`longtrain bench mixers`: sides agree before they are timed, lines end by their limits, and tables say what was."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtrain.bench_common.comparing import deviations, squares
from longtrain.bench_mixers import sides
from longtrain.bench_mixers.__main__ import Worker
from longtrain.bench_mixers.cases import Case
from longtrain.bench_mixers.layers import NAMES
from longtrain.bench_mixers.operators import OPERATORS
from longtrain.cli import build_parser, main
from longtrain.launch import benchmark_mixers
from longtrain.launch.mixers_growth import GIB, Growth, Line, Point, tables
from longtrain.launch.mixers_options import Options, options
from longtrain.layers import MIXERS
from tests.distributed import run_distributed

CPU = torch.device("cpu")
BENCH = ["bench", "mixers", "--device=cpu"]
TINY = [*BENCH, "--heads=2", "--width=8", "--repeats=1"]
ALL = [("operator", name) for name in OPERATORS] + [("mixer", name) for name in NAMES]


def fields(kind: str, name: str, **others: Any) -> dict[str, Any]:
    shapes = {"length": 67, "heads": 2, "width": 8, "dtype": "float32", "layout": "natural", "strategy": "auto"}
    return {"kind": kind, "name": name, **shapes, **others}


def parsed(*words: str) -> Options:
    given = vars(build_parser().parse_args([*BENCH, *words]))
    return options(**{name: value for name, value in given.items() if name != "command"})


# ---- what is measured ------------------------------------------------------------------------------------------------


def checked(rank: int, world: int, folder: str, layout: str) -> dict[str, Any]:
    """What each operator and mixer answers to a check over the ranks."""
    worker = Worker(rank, world, dist.group.WORLD if world > 1 else None, CPU)
    answers = {}
    for kind, name in ALL:
        file = f"{folder}/{kind}-{name}"
        answers[f"{kind} {name}"] = worker.answer(
            {"do": "check", "case": fields(kind, name, layout=layout), "file": file}
        )
    return answers


def test_every_operator_and_mixer_agrees_over_ranks(tmp_path: Path):
    assert set(NAMES) == set(MIXERS)
    for layout in ("natural", "zigzag"):
        ranks = run_distributed(3, checked, str(tmp_path), layout, timeout=240)
        for kind, name in ALL:
            answers = [rank[f"{kind} {name}"] for rank in ranks]
            assert all(answer.keys() == {"losses", "squares"} for answer in answers), answers
            losses, found = answers[0]["losses"], deviations(*(answer["squares"] for answer in answers))
            leaves = len(OPERATORS[name].inputs) - (name == "linear-fixed") if kind == "operator" else 1
            assert len(found) >= 1 + leaves  # the output and the gradients of all leaves
            for result, deviation in found.items():
                assert deviation <= benchmark_mixers.BUDGET * max(losses[result], losses["out"]), (name, result)
                assert losses[result] < 1e-4


@pytest.mark.parametrize(
    ("kind", "name"), [("operator", "conv1d"), ("operator", "linear-token"), ("mixer", "lightning")]
)
def test_a_wrong_result_or_gradient_is_seen(kind: str, name: str, tmp_path: Path):
    case = Case.of(fields(kind, name))
    truth = sides.truth(case)
    make, shard = sides.maker(case, group=None, device=CPU)
    side = make(sides.own_tokens(case, shard, CPU))
    mine = side.run()
    assert max(deviations(sides.compare(side, mine, truth, shard, None)).values()) < 1e-5
    for wrong in mine:
        changed = {result: x.clone() for result, x in mine.items()}
        changed[wrong].view(-1)[3] += 0.01 * changed[wrong].norm()
        found = deviations(sides.compare(side, changed, truth, shard, None))
        assert found[wrong] == pytest.approx(0.01, rel=0.01)
        assert max(value for result, value in found.items() if result != wrong) < 1e-5
    with pytest.raises(KeyError):
        sides.compare(side, {"out": mine["out"]}, truth, shard, None)
    with pytest.raises(ValueError, match=r"out: got shape \[1, 1\], expected \[1, 3\]"):
        squares({"out": torch.ones(1, 1)}, {"out": torch.ones(1, 3)})


def messages(rank: int, world: int, name: str, length: int) -> tuple[dict[str, int], int]:
    worker = Worker(rank, world, dist.group.WORLD, CPU)
    case = fields("operator", name, length=length, strategy="allgather")
    for command in ({"do": "prepare", "side": "it", "case": case}, {"do": "measure", "side": "it"}):
        assert "failed" not in worker.answer(command)
    return worker.answer({"do": "received", "side": "it"}), worker.answer({"do": "memory", "case": case})["bytes"]


def test_bytes_and_memory_are_those_of_one_rank():
    """Linear attention receives the other rank's state whatever T is; softmax the other rank's keys and values."""
    small, large = (run_distributed(2, messages, "linear-token", length)[0] for length in (128, 256))
    state = 2 * 8 * 8 * 4  # bytes: those of two heads in float32; in forward with their log-decays
    handshake = 32  # on a CPU before each call
    assert small[0] == large[0] == {"forward": state + 2 * 4 + handshake, "backward": state}
    inputs = 64 * (4 * 2 * 8 + 2) * 4  # bytes: q, k, v, dout and the decays of a rank's tokens
    assert small[1] > 2 * inputs and 1.8 < large[1] / small[1] < 2.2  # the gradients are as large as the inputs
    keys_and_values = 2 * 64 * 2 * 8 * 4
    assert run_distributed(2, messages, "softmax", 128)[0][0]["forward"] == keys_and_values + handshake


def test_what_cannot_run_says_why(tmp_path: Path):
    worker = Worker(0, 1, None, CPU)
    case = fields("mixer", "softmax", heads=1, width=7)
    answer = worker.answer({"do": "check", "case": case, "file": str(tmp_path / "none")})
    assert list(answer) == ["refused"] and "head_width: got 7" in answer["refused"]


# ---- how T grows -----------------------------------------------------------------------------------------------------


class Scripted:
    """A team whose side takes 100 ms at T = 128, and as much longer as T to some power."""

    def __init__(self, power: float = 1.0) -> None:
        self._power, self._length, self.measured = power, 0, []

    def ask(self, do: str, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        if do == "prepare":
            assert options is not None
            self._length = options["case"]["length"]
            self.measured.append(self._length)
        seconds = 0.1 * (self._length / 128) ** self._power
        answers = {"measure": {"seconds": seconds}, "memory": {"bytes": 8192 * self._length}}
        return [answers.get(do, {"forward": 3, "backward": 4})] * 2


@pytest.mark.parametrize(
    ("words", "name", "power", "last", "end"),
    [
        (["--longest=1024", "--seconds=99"], "delta", 1, 1024, "beyond T 1,024"),
        (["--softmax-longest=512", "--longest=4096", "--seconds=99"], "softmax", 1, 512, "softmax beyond T 512"),
        (
            ["--memory=0.03125", "--seconds=99"],
            "delta",
            1,
            2048,
            "memory, 0.0 GiB a rank",
        ),  # 16 MiB for each of two ranks
        (["--seconds=15", "--memory=100"], "delta", 1, 2048, "time, 19."),  # 3.1 s and 5 runs of 3.2 s at T = 4096
        (["--seconds=20", "--memory=100"], "softmax", 2, 512, "time, 34."),  # 2.1 s and 5 runs of 6.4 s at T = 1024
    ],
)
def test_a_line_ends_where_it_would_take_too_much(words: list[str], name: str, power: float, last: int, end: str):
    chosen = parsed("--shortest=128", "--repeats=1", *words)
    team = Scripted(power)
    (line,) = Growth(chosen, team, 2).measure("operator", {name: None})  # type: ignore[arg-type]
    assert max(line.points) == last and line.end.startswith(end), line
    assert team.measured == [128 * 2**n for n in range(len(team.measured))]
    assert line.points[128] == Point(0.1, 8192 * 128, 3, 4)


def test_a_refused_line_stays_empty():
    team = Scripted()
    chosen = parsed("--shortest=128", "--longest=128")
    refused, other = Growth(chosen, team, 2).measure("mixer", {"a": "too odd", "b": None})  # type: ignore[arg-type]
    assert (refused.points, refused.end) == ({}, "too odd") and list(other.points) == [128]


def test_tables():
    soft = Line("softmax", 1, {128: Point(0.5, 2**20, 0, 0), 256: Point(2.0, 2**21, 0, 0)}, "beyond T 256")
    two = Line("slot", 2, {128: Point(0.25, 2**19, 512, 1024)}, "time, 9.0 s")
    one = Line("slot", 1, {128: Point(0.25, 2**20, 0, 0), 256: Point(0.5, 2**21, 0, 0)}, "beyond T 256")
    text = tables([soft, two, one], ranks=(1, 2), beside="softmax")
    speeds, ratios, memory, received = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    squeezed = [re.sub(" +", " ", part) for part in (speeds, ratios, memory, received)]
    assert squeezed[0].splitlines()[2:] == [
        "| softmax | 1 | 256 | 128 | beyond T 256 |",
        "| slot | 1 | 512 | 512 | beyond T 256 |",
        "| slot | 2 | 512 | | time, 9.0 s |",
    ]
    assert squeezed[1].splitlines()[2:] == ["| slot | 1 | 2.00 | 4.00 |", "| slot | 2 | | |"]
    assert squeezed[2].splitlines()[3:] == ["| slot | 1 | 1.0 | 2.0 |", "| slot | 2 | 0.5 | |"]
    assert squeezed[3].splitlines()[2:] == ["| slot | 2 | 0.5 + 1.0 | |"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_operators_and_mixers_grow(capsys, tmp_path: Path):
    file = tmp_path / "mixers.md"
    words = ["--ranks=2", "--shortest=128", "--longest=256", "--operators=softmax,linear-token", "--mixers=lightning"]
    assert main([*TINY, *words, "--seconds=500", f"--output={file}"]) == 0
    shown, written = capsys.readouterr().out, file.read_text()
    number = r"[\d,]+ +\| "
    for text in (shown, written):
        assert "B 1, H 2, K = V = M 8, D 16, float32" in text and "GPUs were not measured." in text
        assert "2 ranks x" in text and "T doubles from 128 until" in text and "more than 500 s" in text
        assert re.search(r"torch \d", text) and "cores" in text
        for name in ("softmax", "linear-token", "lightning"):
            assert re.search(rf"^\| {name} +\| 2 +\| {number}{number}beyond T 256 +\|", text, re.MULTILINE), name
            assert re.search(rf"^\| {name} +\| 2 +\| [\d.]+ \+ [\d.]+ ", text, re.MULTILINE), name  # received
        assert re.search(r"^\| linear-token +\| 2 +\| \d+\.\d\d +\| \d+\.\d\d +\|$", text, re.MULTILINE)  # of softmax
    assert "![Tokens per second by sequence length](mixers.png)" in written
    assert (tmp_path / "mixers.png").read_bytes().startswith(b"\x89PNG")
    assert shown.index("operator linear-token, 2 ranks: deviates") < shown.index("  1. softmax")


def test_scaling(capsys):
    assert main([*TINY, "--only=scaling", "--operators=linear-fixed", "--mixers=lightning", "--length=256"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"T = 256, forward and backward. 2 processes x \d+ threads over ranks, beside", shown)
    assert re.search(r"^\| linear-fixed +(\| \d+\.\d{3} +){3}\| +\|$", shown, re.MULTILINE)  # the bar is for T = 65,536
    assert re.search(r"^\| lightning +(\| \d+\.\d{3} +){3}\| +\|$", shown, re.MULTILINE)
    timed = shown.index("  1. linear-fixed, one process")
    assert shown.index("operator linear-fixed, 2 ranks: deviates") < timed
    assert shown.index("operator linear-fixed, 1 rank: deviates") < timed


def test_says_no_number_where_results_differ(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(benchmark_mixers, "BUDGET", 0.01)
    words = ["--only=operators", "--operators=linear-fixed", "--ranks=1", f"--output={tmp_path / 'file.md'}"]
    assert main([*TINY, *words]) == 1
    shown = capsys.readouterr()
    assert re.search(r"operator linear-fixed, 1 rank differs from the reference in .*: no comparison", shown.err)
    assert not re.search(r"  1\. ", shown.out) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--only=scaling", "--length=4096"],
        ["--only=operators,scaling", "--operators=conv1d", "--ranks=1,3", "--longest=4096", "--memory=2"],
        ["--only=mixers,scaling", "--mixers=lightning", "--heads=2", "--width=16", "--dtype=bfloat16"],
    ],
)
def test_the_command_in_the_results_measures_the_same(words: list[str]):
    chosen = parsed(*words)
    again = parsed(*chosen.command.split()[3:])
    if "scaling" not in chosen.parts:
        again = replace(again, scaled_mixers=chosen.scaled_mixers)  # of no use to these parts
    assert again == chosen


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--only", "operators,speed", "operators, mixers, scaling"),
        ("--operators", "linear", "softmax, linear-fixed, linear-token"),
        ("--mixers", "lightening", "(nearest: 'lightning'), expected names out of"),
        ("--mixers", "gla,gl", "got 'gl' (nearest: 'gla'), expected names out of"),
        ("--ranks", "1,two", "numbers from 1 to 64"),
        ("--ranks", "0", "numbers from 1 to 64"),
        ("--ranks", "65", "numbers from 1 to 64"),
        ("--shortest", "100", "128 or more"),
        ("--longest", "1024", "2048 (--shortest) or more"),
        ("--softmax-longest", "1024", "2048 (--shortest) or more"),
        ("--length", "0", "128 or more"),
        ("--heads", "0", "1 or more"),
        ("--width", "1", "2 or more"),
        ("--repeats", "0", "1 or more"),
        ("--seconds", "0", "0.1 or more"),
        ("--seconds", "nan", "0.1 or more"),
        ("--seconds", "inf", "finite"),
        ("--memory", "0", "above 0"),
        ("--dtype", "int8", "float32"),
        ("--layout", "zigzak", "(nearest: 'zigzag'), expected one of natural"),
        ("--layout", "striped", "natural, contiguous, zigzag"),
        ("--strategy", "ring", "auto, allgather, alltoall, chain, ulysses"),
        ("--output", "nowhere/file.md", "a folder that exists"),
        ("--output", "plot.png", "a .md file"),
        ("--device", "tpu", "cpu or gpu"),
    ],
)
def test_refuses_in_one_line(capsys, monkeypatch: pytest.MonkeyPatch, option: str, value: str, says: str):
    monkeypatch.setattr(benchmark_mixers, "run", lambda chosen: pytest.fail("started"))
    assert main([*BENCH, f"{option}={value}"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown.startswith(f"longtrain: {option}: got ") and says in shown


def test_a_memory_limit_is_shared_by_the_ranks_of_a_cpu():
    assert Growth(parsed("--memory=3"), Scripted(), 2)._room == 1.5 * GIB  # type: ignore[arg-type]
