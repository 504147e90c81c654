"""`longtrain bench mixers`: operators and mixers over ranks as T grows, and two processes beside one of two threads.

Sides of one comparison live at the same time and are measured in turn, the best of several; idle workers sleep. Before
a side is timed, its results and gradients at a short length must be those of the float64 reference, as closely as the
one-device form comes to it. An operator's inputs are those of `longtrain.bench_mixers.cases`.
"""

import contextlib
import datetime
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtrain.bench_common.comparing import deviations
from longtrain.launch.benchmarking import (
    Disagreement,
    Said,
    check_agreement,
    in_turn,
    machine_rows,
    table,
)
from longtrain.launch.local import cores
from longtrain.launch.mixers_growth import Growth, Line, tables
from longtrain.launch.mixers_options import SOFTMAX, Options
from longtrain.launch.team import Team

WORKER = "longtrain.bench_mixers"
SCALING_BAR, BAR_LENGTH = 0.90, 65_536  # of operators, at this T on a CPU
CHECKED = 203  # tokens of the check: several chunks, and not a multiple of anything
# Every side loses about what the one-device form loses; the rest is room for another order of sums.
BUDGET = 4.0
KINDS = {"operators": "operator", "mixers": "mixer"}
TITLES = {"operators": "Operators", "mixers": "Mixers"}


def run(chosen: Options) -> int:
    """Measure and print; 0, or 1 where results are not those of one device."""
    with contextlib.ExitStack() as stack:
        bench = Bench(chosen, stack)
        bench.said.say(_setting(chosen))
        try:
            bench.grow()
            if "scaling" in chosen.parts:
                bench.scaling()
        except Disagreement as difference:
            print(f"longtrain: {difference}: no comparison", file=sys.stderr)
            return 1
    bench.said.write(chosen.output)
    return 0


class Bench:
    """The workers, and what was said so far."""

    def __init__(self, chosen: Options, stack: contextlib.ExitStack) -> None:
        self._chosen = chosen
        self._stack = stack
        self.said = Said()
        self._files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longtrain-bench-")))

    # ---- the parts -------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Everything at T, 2T, 4T ... over each number of ranks: tables, and a plot beside the output."""
        chosen = self._chosen
        lines: dict[str, list[Line]] = {part: [] for part in KINDS if part in chosen.parts}
        for ranks in chosen.ranks if lines else ():
            with Team(WORKER, ranks, threads=chosen.threads(ranks), device=chosen.device) as team:
                growth = Growth(chosen, team, ranks)
                for part, found in lines.items():
                    cases = {name: chosen.case(KINDS[part], name, CHECKED) for name in getattr(chosen, part)}
                    refused = {name: self._refused(team, name, case, ranks) for name, case in cases.items()}
                    found += growth.measure(KINDS[part], refused)
        for part, found in lines.items():
            beside = SOFTMAX if SOFTMAX in getattr(chosen, part) else None
            self.said.say(f"## {TITLES[part]}\n\n{tables(found, ranks=chosen.ranks, beside=beside)}")
        if lines and chosen.output is not None:
            self._plot(lines, chosen.output.with_suffix(".png"))

    def scaling(self) -> None:
        """Each operator over processes, beside one process with as many threads as all of them together."""
        chosen, processes = self._chosen, self._chosen.processes
        threads = chosen.threads(processes)
        share = 1 if chosen.device == "cpu" else processes  # devices for each one of the single process
        named = [("operator", name) for name in chosen.operators if name != SOFTMAX]
        rows = []
        with (
            Team(WORKER, processes, threads=threads, device=chosen.device) as team,
            Team(WORKER, 1, threads=threads * processes, device=chosen.device) as single,
        ):
            for kind, name in [*named, *(("mixer", name) for name in chosen.scaled_mixers)]:
                short, case = chosen.case(kind, name, CHECKED), chosen.case(kind, name, chosen.length)
                refused = self._refused(team, name, short, processes) or self._refused(single, name, short, 1, True)
                if refused:
                    rows.append([name, "", "", refused, ""])
                    continue
                team.ask("prepare", {"side": name, "case": case})
                single.ask("prepare", {"side": name, "case": case, "single": True})
                both = {f"{name}, one process": (single, name), f"{name}, {processes} processes": (team, name)}
                alone, shared = in_turn(both, repeats=chosen.repeats).values()
                ratio = alone / shared / share
                bar = ""
                if kind == "operator" and share == 1 and chosen.length == BAR_LENGTH:
                    bar = f">= {SCALING_BAR:.2f}: {'met' if ratio >= SCALING_BAR else '**missed**'}"
                rows.append([name, f"{alone:.3f}", f"{shared:.3f}", f"{ratio:.3f}", bar])
                for workers in (team, single):
                    workers.ask("forget")
        each = "" if share == 1 else f", for each of {share} devices"
        header = [
            "operator" if not chosen.scaled_mixers else "side",
            "one process, s",
            f"{processes} processes, s",
            f"throughput{each}",
            "bar",
        ]
        self.said.say(
            f"## {processes} processes beside one\n\nT = {chosen.length:,}, forward and backward. {processes} processes"
            f"{f' x {threads} threads' if share == 1 else ''} over ranks, beside the one-device operator in one process"
            f"{f' x {threads * processes} threads' if share == 1 else ''}; in turn, the best of {chosen.repeats}.\n\n"
            + table(header, rows)
        )

    # ---- checks ----------------------------------------------------------------------------------------------------

    def _refused(self, team: Team, name: str, case: Mapping[str, Any], ranks: int, single: bool = False) -> str | None:
        """Compare a side with the truth; None, or why it cannot run over these ranks.

        Raises:
            Disagreement: its results are farther from the truth than those of one device, by more than `BUDGET`.
        """
        side = f"{case['kind']} {name}, {ranks} rank{'s' * (ranks > 1)}"
        file = str(self._files / f"{case['kind']}-{name}")
        answers = team.ask("check", {"case": case, "file": file, "single": single})
        for answer in answers:
            if "refused" in answer:
                print(f"{side}: cannot run: {answer['refused']}", flush=True)
                return answer["refused"]
        found = deviations(*(answer["squares"] for answer in answers))
        losses = answers[0]["losses"]
        allowed = {result: BUDGET * max(loss, losses["out"]) for result, loss in losses.items()}
        check_agreement(side, found, allowed, truth="the reference")
        worst = max(found, key=lambda result: found[result])
        shown = f"out {found['out']:.1e}, at worst {worst} {found[worst]:.1e}"
        print(f"{side}: deviates from the reference by {shown}", flush=True)
        return None

    def _plot(self, lines: Mapping[str, Sequence[Line]], file: Path) -> None:
        from longtrain.plots import Panel, plot_speeds

        panels = [
            [
                Panel(
                    f"{TITLES[part]}, {ranks} rank{'s' * (ranks > 1)}",
                    {line.name: line.speeds for line in found if line.ranks == ranks},
                )
                for ranks in self._chosen.ranks
            ]
            for part, found in lines.items()
        ]
        plot_speeds(panels, file, beside=SOFTMAX)
        self.said.say(f"![Tokens per second by sequence length]({file.name})")


def _setting(chosen: Options) -> str:
    """Title, hardware, shapes and how it is measured."""
    on_cpu = chosen.device == "cpu"
    shapes = f"B 1, H {chosen.heads}, K = V = M {chosen.width}, D {chosen.heads * chosen.width}, {chosen.dtype}"
    layout = "contiguous; zigzag for softmax attention" if chosen.layout == "natural" else chosen.layout
    rows = [
        *machine_rows(chosen.device),
        ["shapes", f"{shapes}; a convolution over {chosen.heads * chosen.width} channels"],
        ["layout, strategy", f"{layout}; linear operators by {chosen.strategy}, mixers as their options say"],
        ["measured", "forward and backward pass; tokens of the whole sequence by the seconds of the slowest rank"],
        ["method", f"sides in turn, {chosen.repeats} times each after one run of warm-up, the best of each"],
        [
            "checked first",
            f"outputs and all gradients at T {CHECKED} against the float64 reference, within {BUDGET:g} x what one "
            "device loses to its dtype",
        ],
    ]
    if chosen.growing:
        threads = {ranks: chosen.threads(ranks) for ranks in chosen.ranks}
        shared = [ranks for ranks in chosen.ranks if ranks > cores()]
        crowd = f"; {' and '.join(map(str, shared))} ranks share {cores()} cores" if on_cpu and shared else ""
        shown = ", ".join(f"{n} rank{'s' * (n > 1)} x {count} threads" for n, count in threads.items())
        rows += [
            ["ranks", shown + crowd if on_cpu else f"{', '.join(map(str, chosen.ranks))}, a device each"],
            ["limits", _limits(chosen)],
        ]
    where = "a CPU" if on_cpu else f"{max(chosen.ranks)} GPU{'s' if max(chosen.ranks) > 1 else ''}"
    note = "GPUs were not measured." if on_cpu else "The project's bar is for CPUs."
    text = f"# Mixers over ranks on {where}\n\n`{chosen.command}`, {datetime.date.today().isoformat()}. {note}"
    return f"{text}\n\n{table(['what', 'setting'], rows)}"


def _limits(chosen: Options) -> str:
    """When a line ends."""
    if chosen.memory is None:
        memory = "half of the host's memory" if chosen.device == "cpu" else "70 % of a device's free memory"
    else:
        memory = f"{chosen.memory:g} GiB" + (" for all ranks together" if chosen.device == "cpu" else " a rank")
    longest = "" if chosen.longest is None else f", at T {chosen.longest:,}"
    return (
        f"T doubles from {chosen.shortest:,} until a line (a side over some ranks, all its measurements) would take "
        f"more than {chosen.seconds:g} s or {memory}{longest}; softmax at most to T {chosen.softmax_longest:,}"
    )
