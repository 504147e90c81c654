"""`longtrain bench training RECIPE --devices 1,2,4`: what more devices bring, by sequence degree and by data degree.

Four lines. Strong: the same step on more devices, whose losses must be the same before any number is shown. Weak: a
longer sequence, or more sequences, so that each device keeps as many tokens. On a CPU a device is a process with its
share of the cores, the same in every run.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtrain.errors import UsageError
from longtrain.launch import scaling_longest
from longtrain.launch.benchmark_training import LOSS_TOLERANCE, LOSS_TOLERANCE_BFLOAT16
from longtrain.launch.benchmarking import Disagreement, Said, machine_rows, table
from longtrain.launch.local import cores, run_ranks, train_command

if TYPE_CHECKING:
    from longtrain.recipe import Recipe

GIB = 2**30
LINES = ("sequence, strong", "sequence, weak", "data, strong", "data, weak")


@dataclass(frozen=True)
class Options:
    """What to measure, checked."""

    recipe: str
    overrides: tuple[str, ...]
    devices: tuple[int, ...]
    repeats: int
    steps: int
    warm_up: int
    longest: float | None  # GiB of a device whose longest sequence is measured; None: only planned
    output: Path | None


@dataclass(frozen=True)
class Point:
    """One line's run on so many devices: its keys, and what was found."""

    line: str
    devices: int
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """The best run of a point."""

    line: str
    devices: int
    length: int  # T
    sequences: int  # of a step
    tokens_per_second_per_device: float
    efficiency: float  # over the line's first point
    memory_bytes: int  # the most that a device's process held; on a CPU all of the process
    waiting: float | None  # share of the time in which ranks waited for messages; None where it is not measured
    planned_tokens_per_second_per_device: float | None = None  # None where there is no plan
    planned_memory_bytes: float | None = None  # of tensors, and what allocators waste


class Planned:
    """What `longtrain plan` says of the runs; `reason` why there is no plan, where there is none."""

    def __init__(self, chosen: Options, device: str) -> None:
        self._chosen = chosen
        self.kind, self.reason = _device_of_plans(device)

    def beside(self, result: Result, point: Point) -> Result:
        """The result with its plan."""
        from longtrain.planning import devices_named, plan

        if self.reason:
            return result
        try:
            planned = plan(
                self._chosen.recipe,
                [*self._chosen.overrides, *point.keys],
                devices_named(f"{point.devices}x{self.kind}"),
            )
        except UsageError as error:
            self.reason = str(error)
            return result
        rate, needed = planned.tokens_per_second, planned.needed
        return replace(result, planned_tokens_per_second_per_device=rate, planned_memory_bytes=needed)

    def longest(self) -> dict[int, int | None]:
        """The longest T by number of devices that share the sequence; None where not even 1,024 tokens fit."""
        from longtrain.planning import devices_named, longest

        found: dict[int, int | None] = {}
        for count in () if self.reason else self._chosen.devices:
            keys = [*self._chosen.overrides, *scaling_longest.shared_by(count)]
            try:
                one = longest(self._chosen.recipe, keys, devices_named(f"{count}x{self.kind}"))
            except UsageError as error:
                self.reason = str(error)
                break
            found[count] = None if one is None else one.recipe.data.length
        return found


def _device_of_plans(device: str) -> tuple[str, str | None]:
    """The name that plans have for this machine's device, or why they have none."""
    import torch

    from longtrain.planning import devices_named

    if device == "cpu":
        return "cpu", None
    card = torch.cuda.get_device_name()
    for word in card.lower().replace("-", " ").split():
        try:
            devices_named(word)
        except UsageError:
            continue
        return word, None
    return "", f"plans do not know {card}"


def options(
    recipe: str,
    overrides: Sequence[str],
    *,
    devices: str,
    repeats: int,
    steps: int,
    warm_up: int,
    longest: float | None,
    output: Path | None,
) -> Options:
    """The options of the command line; a UsageError for what cannot work."""
    words = [word.strip() for word in devices.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words) or len(set(words)) < len(words):
        raise UsageError(f"--devices: got {devices!r}, expected different numbers above 0, such as 1,2,4")
    for name, value, least in (("repeats", repeats, 1), ("steps", steps, 1), ("warm-up", warm_up, 0)):
        if value < least:
            raise UsageError(f"--{name}: got {value}, expected {least} or more")
    if longest is not None and not 0 < longest < math.inf:
        raise UsageError(f"--longest: got {longest:g}, expected GiB above 0, such as 1.5")
    if output is not None and not output.is_dir():
        raise UsageError(f"--output: got {output}, expected a folder that exists, such as docs/benchmarks")
    counts = tuple(sorted(map(int, words)))
    return Options(recipe, tuple(overrides), counts, repeats, steps, warm_up, longest, output)


def run(chosen: Options) -> int:
    """Measure, and print and write a table, a plot and JSON; 0, or 1 where devices do not compute the same losses."""
    from longtrain.config import compose

    recipe = compose(chosen.recipe, chosen.overrides)
    device = _device(recipe, chosen.devices[-1])
    points, refused = _points(chosen, recipe)
    said = Said()
    said.say(f"# Scaling of training `{recipe.recipe}`")
    said.say(table(["what", "setting"], _setting(chosen, recipe, device)))
    try:
        measured = _measure(chosen, points, recipe.trainer.precision)
    except Disagreement as error:
        print(f"{error}: no comparison")
        return 1
    planned = Planned(chosen, device)
    results = [planned.beside(result, point) for result, point in zip(_results(points, measured), points, strict=True)]
    header = ["line", "devices", "T", "sequences", "tokens/s/device", "planned", "efficiency"]
    said.say(table([*header, "GiB/device", "planned", "waiting"], [_row(result) for result in results]))
    longest = planned.longest()
    both = [] if chosen.longest is None or planned.reason else _longest(chosen, planned.kind)
    if both and chosen.longest is not None:
        said.say(scaling_longest.rows(both, chosen.longest * GIB))
    elif longest:
        rows = [[str(count), "–" if length is None else f"{length:,}"] for count, length in longest.items()]
        said.say(table(["devices that share a sequence", "longest T that fits, planned"], rows))
    if planned.reason:
        said.say(f"Not planned: {planned.reason}")
    for line, reason in refused.items():
        said.say(f"Not measured, {line}: {reason}")
    said.say(
        "Efficiency: tokens/s/device over those of the line's first row. As T grows a token sees more others, which "
        "makes it dearer where layers attend to all of them, on any number of devices. Waiting: a rank's mean share of "
        "the time until messages had come, those of sharded weights and gradients too. Planned: by `longtrain plan`, "
        "whose memory is that of tensors, on a CPU without the interpreter and its libraries."
    )
    _write(chosen, recipe, results, {"longest_planned": longest, "longest": scaling_longest.as_data(both)}, said)
    return 0


def _longest(chosen: Options, kind: str) -> list[scaling_longest.Longest]:
    """The longest sequences that fit, by runs of two steps."""
    from longtrain.planning import devices_named

    threads = max(1, cores() // chosen.devices[-1])

    def held(count: int, length: int) -> int | None:
        keys = (*scaling_longest.shared_by(count), f"launch.processes={count}", f"data.length={length}")
        point = Point("longest", count, (*keys, "trainer.steps=2", "trainer.sequences=1", "trainer.accumulation=1"))
        try:
            size = _run(replace(chosen, warm_up=1), point, threads)["memory_bytes"]
        except UsageError:
            size = None
        told = "failed" if size is None else f"{size / GIB:.2f} GiB"
        print(f"  longest: {count:>3} devices, {length:>12,} tokens: {told}", flush=True)
        return size

    devices = [devices_named(f"{count}x{kind}") for count in chosen.devices]
    assert chosen.longest is not None
    return scaling_longest.measured(chosen.recipe, chosen.overrides, devices, memory=chosen.longest * GIB, held=held)


def _device(recipe: "Recipe", most: int) -> str:
    """The kind of device, "cpu" or "cuda"; a UsageError where there are fewer GPUs than asked for."""
    import torch

    gpus = torch.cuda.device_count() if recipe.launch.device != "cpu" else 0
    if recipe.launch.device == "cuda" and not gpus:
        raise UsageError("launch.device: got 'cuda', but PyTorch finds no GPU here; launch.device=cpu would work")
    if gpus and most > gpus:
        raise UsageError(f"--devices: got {most}, but there are {gpus} GPUs; launch.device=cpu would work")
    return "cuda" if gpus else "cpu"


def _points(chosen: Options, recipe: "Recipe") -> tuple[list[Point], dict[str, str]]:
    """All runs, and why a line has none: what a recipe's layers or data refuse."""
    from longtrain.config import compose

    points: list[Point] = []
    refused: dict[str, str] = {}
    accumulation = recipe.trainer.accumulation
    least = math.lcm(*chosen.devices) * accumulation
    shared = math.ceil(recipe.trainer.sequences / least) * least  # a step that every number of devices can cut
    each = math.ceil(recipe.trainer.sequences / accumulation) * accumulation
    for line in LINES:
        ours = []
        for count in chosen.devices:
            along_sequence, weak = line.startswith("sequence"), line.endswith("weak")
            sequences = each if along_sequence else each * count if weak else shared
            length = recipe.data.length * (count if along_sequence and weak else 1)
            degrees = (count, 1) if along_sequence else (1, count)
            keys = (
                *(f"launch.processes={count}", f"parallel.sequence={degrees[0]}", f"parallel.data={degrees[1]}"),
                *(f"data.length={length}", f"trainer.sequences={sequences}"),
                *(f"trainer.steps={chosen.warm_up + chosen.steps}", "launch.launcher=local"),
            )
            try:
                compose(chosen.recipe, [*chosen.overrides, *keys])
            except UsageError as error:
                refused[line] = str(error)
                break
            ours.append(Point(line, count, keys))
        else:
            points += ours
    if not points:
        raise UsageError(next(iter(refused.values())))
    return points, refused


def _measure(chosen: Options, points: Sequence[Point], precision: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """The best of several runs of each different set of keys, in turn. Raises a Disagreement for other losses."""
    allowed = LOSS_TOLERANCE_BFLOAT16 if precision == "bfloat16" else LOSS_TOLERANCE
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    truths: dict[str, list[float]] = {}
    threads = max(1, cores() // chosen.devices[-1])
    for repeat in range(1, chosen.repeats + 1):
        done: dict[tuple[str, ...], dict[str, Any]] = {}
        for point in points:
            if point.keys in done:
                continue
            found = done[point.keys] = _run(chosen, point, threads)
            if point.line.endswith("strong"):
                truth = truths.setdefault(point.line, found["losses"])
                off = max(abs(a - b) / abs(b) for a, b in zip(found["losses"], truth, strict=True))
                if not off <= allowed:
                    raise Disagreement(f"{point.line}, {point.devices} devices: losses differ by {off:.1e}")
            rate = found["tokens"] / found["seconds"] / point.devices
            print(f"  {repeat}. {point.line:<16} {point.devices:>3} devices {rate:>12,.0f} tokens/s/device", flush=True)
            if point.keys not in best or found["seconds"] < best[point.keys]["seconds"]:
                best[point.keys] = found
    return best


def _run(chosen: Options, point: Point, threads: int) -> dict[str, Any]:
    """One run of the recipe's trainer on the point's devices."""
    with tempfile.TemporaryDirectory(prefix="longtrain-bench-") as folder:
        output = Path(folder) / "found.json"
        words = ["--config-name", chosen.recipe, "--warm-up", str(chosen.warm_up), "--output", str(output)]
        command = train_command([*words, *chosen.overrides, *point.keys], module="longtrain.bench_training")
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = run_ranks(command, processes=point.devices, logs=Path(folder) / "logs", environment=environment)
        if code:
            raise UsageError(f"{point.line} on {point.devices} devices ended with exit code {code}")
        return json.loads(output.read_text(encoding="utf-8"))


def _results(points: Sequence[Point], measured: Mapping[tuple[str, ...], dict[str, Any]]) -> list[Result]:
    results: list[Result] = []
    first: dict[str, float] = {}
    for point in points:
        found, keys = measured[point.keys], dict(key.split("=", 1) for key in point.keys)
        rate = found["tokens"] / found["seconds"] / point.devices
        results.append(
            Result(
                line=point.line,
                devices=point.devices,
                length=int(keys["data.length"]),
                sequences=int(keys["trainer.sequences"]),
                tokens_per_second_per_device=rate,
                efficiency=rate / first.setdefault(point.line, rate),
                memory_bytes=found["memory_bytes"],
                waiting=found["waiting"],
            )
        )
    return results


def _row(result: Result) -> list[str]:
    return [
        result.line,
        str(result.devices),
        f"{result.length:,}",
        str(result.sequences),
        f"{result.tokens_per_second_per_device:,.0f}",
        _or_dash(result.planned_tokens_per_second_per_device, lambda rate: f"{rate:,.0f}"),
        f"{result.efficiency:.3f}",
        f"{result.memory_bytes / 2**30:.2f}",
        _or_dash(result.planned_memory_bytes, lambda size: f"{size / 2**30:.2f}"),
        _or_dash(result.waiting, lambda share: f"{100 * share:.0f} %"),
    ]


def _or_dash(value: float | None, written: Callable[[float], str]) -> str:
    return "–" if value is None else written(value)


def _setting(chosen: Options, recipe: "Recipe", device: str) -> list[list[str]]:
    threads = max(1, cores() // chosen.devices[-1])
    most = chosen.devices[-1]
    own = "one GPU" if device == "cuda" else f"one process with {threads} thread{'s' if threads > 1 else ''}"
    crowded = device == "cpu" and most > cores()
    rows = [
        *machine_rows(device),
        [
            "device",
            own + (f"; {most} of them share {cores()} cores: what they lose there is no message's" if crowded else ""),
        ],
        [
            "recipe",
            f"T = {recipe.data.length:,}, width {recipe.model.width}, depth {recipe.model.depth}, "
            f"{recipe.trainer.precision}, engine {recipe.engine}, layout {recipe.parallel.layout}",
        ],
        ["method", f"{chosen.steps} timed steps after {chosen.warm_up}, in turn, best of {chosen.repeats}"],
    ]
    if device == "cuda":
        rows.append(["waiting", "not measured on GPUs, where streams wait and not processes"])
    return rows


def _write(
    chosen: Options, recipe: "Recipe", results: Sequence[Result], longest: Mapping[str, Any], said: Said
) -> None:
    if chosen.output is None:
        return
    from longtrain import plots

    stem = chosen.output / f"scaling_{recipe.recipe}"
    curves = {
        line: {result.devices: result.tokens_per_second_per_device for result in results if result.line == line}
        for line in dict.fromkeys(result.line for result in results)
    }
    plots.plot_scaling(curves, stem.with_suffix(".png"))
    said.say(f"![Tokens per second and device]({stem.name}.png)")
    said.write(stem.with_suffix(".md"))
    found: dict[str, Any] = {"recipe": recipe.recipe, "overrides": list(chosen.overrides)}
    found |= {"results": [asdict(one) for one in results], **longest}
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
