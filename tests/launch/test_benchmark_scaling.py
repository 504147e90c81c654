"""`longtrain bench training --devices`: lines over devices, the same losses before any number, and files."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longtrain import planning
from longtrain.bench_training import waits
from longtrain.cli import main
from longtrain.launch import benchmark_scaling, scaling_longest
from tests.distributed import run_distributed

TINY = ["launch.device=cpu", "data.length=64", "model.width=32", "model.depth=2", "layers.pattern=softmax"]
BENCH = ["bench", "training", "quickstart", *TINY]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Runs that are not made: a device does 100 tokens/s, less 10 for each other one; the keys of each run."""
    runs: list[tuple[str, ...]] = []

    def run(chosen: Any, point: benchmark_scaling.Point, threads: int) -> dict[str, Any]:
        runs.append(point.keys)
        rate = (100 - 10 * (point.devices - 1)) * point.devices
        return {
            "losses": [5.5, 5.0],
            "seconds": 1.0 + len(runs) / 1e6,
            "tokens": rate,
            "memory_bytes": 2**30,
            "waiting": 0.25,
        }

    def longest(name: str, overrides: list[str], devices: planning.Devices) -> planning.Plan:
        return planning.plan(name, [*overrides, f"data.length={1024 * devices.count}"], devices)

    monkeypatch.setattr(benchmark_scaling, "_run", run)
    monkeypatch.setattr(planning, "longest", longest)  # which takes many plans to find
    return runs


def test_lines_over_devices(made_up: list[tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--devices=1,2", "--repeats=2", "--steps=2", "--warm-up=1", f"--output={tmp_path}"]
    assert main([*BENCH, *options, "trainer.sequences=3"]) == 0
    first = made_up[: len(made_up) // 2]
    assert made_up == [*first, *first] and len(set(first)) == len(first)  # in turn, no run twice
    written = json.loads((tmp_path / "scaling_quickstart.json").read_text())
    found = written["results"]
    text = (tmp_path / "scaling_quickstart.md").read_text()
    assert written["longest_planned"] == {"1": 1024, "2": 2048} and "| 2                             | 2,048" in text
    told = [(one["line"], one["devices"], one["length"], one["sequences"]) for one in found]
    assert told == [
        *(("sequence, strong", 1, 64, 3), ("sequence, strong", 2, 64, 3)),
        *(("sequence, weak", 1, 64, 3), ("sequence, weak", 2, 128, 3)),
        *(("data, strong", 1, 64, 4), ("data, strong", 2, 64, 4)),  # 3 sequences cannot be shared by two
        *(("data, weak", 1, 64, 3), ("data, weak", 2, 64, 6)),
    ]
    assert all(one["efficiency"] == pytest.approx(1.0 if one["devices"] == 1 else 0.9, rel=1e-3) for one in found)
    said = capsys.readouterr().out
    assert text in said.replace("\n\n\n", "\n\n") or all(line in said for line in text.splitlines())
    (row,) = [line.split("|") for line in text.splitlines() if line.startswith("| data, weak       | 2 ")]
    cells = [cell.strip() for cell in row[3:-1]]
    assert cells[:3] == ["64", "6", "90"] and [cells[n] for n in (4, 5, 7)] == ["0.900", "1.00", "25 %"]
    assert float(cells[3].replace(",", "")) > 0 and 0 <= float(cells[6]) < 1  # planned
    assert all(one["planned_memory_bytes"] > 0 for one in found)
    assert (tmp_path / "scaling_quickstart.png").stat().st_size > 1000


def test_without_a_plan_the_columns_are_empty(
    made_up: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark_scaling, "_device_of_plans", lambda device: ("", "plans do not know X1"))
    assert main([*BENCH, "--devices=1", "--repeats=1"]) == 0
    said = capsys.readouterr().out
    assert "Not planned: plans do not know X1" in said and "longest T" not in said
    (row,) = [line for line in said.splitlines() if line.startswith("| data, weak")]
    assert [cell.strip() for cell in row.split("|")[5:-1]] == ["100", "–", "1.000", "1.00", "–", "25 %"]


def test_no_number_where_losses_differ(
    made_up: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = benchmark_scaling._run

    def other(chosen: Any, point: benchmark_scaling.Point, threads: int) -> dict[str, Any]:
        found = run(chosen, point, threads)
        return found | {"losses": [5.5, 5.02]} if "parallel.data=2" in point.keys else found

    monkeypatch.setattr(benchmark_scaling, "_run", other)
    assert main([*BENCH, "--devices=1,2"]) == 1
    said = capsys.readouterr().out
    assert "data, strong, 2 devices: losses differ by 4.0e-03: no comparison" in said and "efficiency" not in said


def test_a_line_that_the_recipe_refuses_says_why(
    made_up: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    ulysses = ["parallel.strategy=ulysses", "layers.mixers={softmax: {heads: 2}}"]  # for at most two ranks
    assert main([*BENCH, *ulysses, "--devices=1,4", "--repeats=1"]) == 0
    said = capsys.readouterr().out
    assert "Not measured, sequence, strong: parallel.strategy" in said and "| data, weak " in said
    assert "| sequence, strong" not in said


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--devices=1,x"], ("--devices: got '1,x'", "1,2,4")),
        (["--devices=2,2"], ("--devices: got '2,2'",)),
        (["--devices=0"], ("--devices: got '0'",)),
        (["--devices=1", "--steps=0"], ("--steps: got 0", "1 or more")),
        (["--devices=1", "--output=nowhere"], ("--output: got nowhere", "docs/benchmarks")),
        (["--output=."], ("--output", "--devices")),
        (["--longest=1"], ("--longest: got 1.0 without --devices",)),
        (["--devices=1", "--longest=0"], ("--longest: got 0", "GiB above 0")),
    ],
)
def test_refusals(options: list[str], parts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BENCH, *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(part in said for part in parts), said


@pytest.mark.parametrize("start", [1, 5000, 64 * 1024, 10**6])
@pytest.mark.parametrize("most", [1023, 1024, 2047, 50_000, 65_536, 1_000_000])
def test_the_longest_that_fits_is_found_from_anywhere(start: int, most: int) -> None:
    asked: list[int] = []

    def fits(length: int) -> bool:
        asked.append(length)
        return length <= most

    found = scaling_longest.find(fits, start)
    if most < 1024:
        assert found is None
    else:
        assert found is not None and most - max(1024, most // 8) < found <= most
    assert len(set(asked)) == len(asked) < 16
    if most // 2 < start <= most:
        assert len(asked) <= 6


def test_longest_sequences_are_measured_beside_planned(
    made_up: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, interpreter = benchmark_scaling._run, 3 * 2**28

    def held(chosen: Any, point: benchmark_scaling.Point, threads: int) -> dict[str, Any]:
        found, keys = run(chosen, point, threads), dict(key.split("=", 1) for key in point.keys)
        if point.line != "longest":
            return found
        planned = planning.plan(chosen.recipe, [*chosen.overrides, *point.keys], planning.devices_named("cpu"))
        assert keys["parallel.sequence"] == str(point.devices) and chosen.warm_up == 1
        return found | {"memory_bytes": interpreter + planned.memory.total / point.devices / 1.25}

    monkeypatch.setattr(benchmark_scaling, "_run", held)
    assert main([*BENCH, "--devices=1", "--repeats=1", "--longest=0.5", f"--output={tmp_path}"]) == 0
    said = capsys.readouterr().out
    (found,) = json.loads((tmp_path / "scaling_quickstart.json").read_text())["longest"].values()
    # A quarter more than planned, but for the plan of 1,024 tokens and the margin for allocators.
    assert 1.1 < found["measured"] / found["planned"] < 1.4
    assert f"{found['planned']:,}" in said and f"{found['measured']:,}" in said and "in 0.5 GiB a device" in said


def _late(rank: int, world: int) -> tuple[float, int]:
    x = torch.ones(1)
    dist.barrier()
    with waits() as waited:
        if rank == 1:
            time.sleep(0.5)
        dist.all_reduce(x)
    dist.all_reduce(x)  # no longer counted
    return waited.seconds, waited.messages


def test_waits_are_counted_where_they_are() -> None:
    early, late = run_distributed(2, _late)
    assert early[1] == late[1] == 1
    assert early[0] > 0.3 and late[0] < early[0]


def test_measures_a_real_run(tmp_path: Path) -> None:
    chosen = benchmark_scaling.options(
        "quickstart", TINY, devices="2", repeats=1, steps=2, warm_up=1, longest=None, output=tmp_path
    )
    keys = ("launch.processes=2", "parallel.sequence=2", "trainer.steps=3")
    found = benchmark_scaling._run(chosen, benchmark_scaling.Point("sequence, strong", 2, keys), 1)
    assert len(found["losses"]) == 3 and found["tokens"] == 2 * 64 and found["seconds"] > 0
    assert found["memory_bytes"] > 2**27 and 0 < found["waiting"] < 1


@pytest.mark.full
def test_measures_a_real_recipe(tmp_path: Path) -> None:
    options = ["--devices=1,2", "--repeats=1", "--steps=2", "--warm-up=1", f"--output={tmp_path}"]
    assert main([*BENCH, *options]) == 0
    found = json.loads((tmp_path / "scaling_quickstart.json").read_text())["results"]
    assert [(one["line"], one["devices"]) for one in found] == [
        (line, devices) for line in benchmark_scaling.LINES for devices in (1, 2)
    ]
    for one in found:
        assert one["tokens_per_second_per_device"] > 0 and one["memory_bytes"] > 2**27
        assert 0 <= one["waiting"] < 1 and (one["devices"] == 1 or one["waiting"] > 0)
