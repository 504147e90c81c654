"""`longtrain bench attention`: attention over several processes beside one process's SDPA, and beside a public package.

The workers of all sides live for the whole run and are measured in turn, the best of several; the others sleep
meanwhile. Before a side is timed, its results on the same inputs must be those of SDPA.
"""

import contextlib
import datetime
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longtrain.bench_common.comparing import deviations
from longtrain.launch.attention_options import PARTS, Options
from longtrain.launch.benchmarking import (
    Disagreement,
    Said,
    check_agreement,
    in_turn,
    listed,
    machine_rows,
    table,
)
from longtrain.launch.local import cores
from longtrain.launch.team import Team

WORKER = "longtrain.bench_attention"
LAYOUTS = ("zigzag", "striped", "contiguous")
PACKED_LAYOUTS = ("balanced", "zigzag", "zigzag to balanced", "contiguous", "contiguous to balanced")
SCALING_BAR, PACKED_BAR, RIVAL_BAR, MEMORY_BAR = 0.95, 0.80, 3.0, 0.30
NINE_MIXED = (6000, 4000, 2500, 1500, 1000, 600, 400, 284, 100)  # tokens; other lengths in proportion
# Both sides lose about what this one loses; the rest is room for another order of sums.
BUDGET = 4.0  # allowed deviation from SDPA's results, in units of what SDPA loses itself to its dtype
WORLDS, GROWING_WORLDS = (1, 2, 4), (2, 4, 8)  # ranks whose memory is measured: at one length, at one length per rank
MEMORY_HEADS, MEMORY_KV_HEADS, MEMORY_WIDTH = 16, 2, 64
INSTALL_RIVAL = "pip install --no-deps ring-attention-pytorch==0.5.20 einops beartype jaxtyping wadler-lindig"
Side = tuple[str, str]  # layout, strategy


def run(chosen: Options) -> int:
    """Measure and print; 0, or 1 where results differ from SDPA's."""
    with contextlib.ExitStack() as stack:
        bench = Bench(chosen, stack)
        bench.said.say(_setting(chosen))
        parts: dict[str, Callable[[], None]] = {
            "scaling": bench.scaling,
            "packed": bench.packed,
            "rival": bench.rival,
            "memory": bench.memory,
            "virtual": bench.virtual,
        }
        try:
            for name in PARTS:
                if name in chosen.parts:
                    parts[name]()
        except Disagreement as difference:
            print(f"longtrain: {difference}: no comparison", file=sys.stderr)
            return 1
    bench.said.write(chosen.output)
    return 0


class Bench:
    """The workers, and what was said so far."""

    def __init__(self, chosen: Options, stack: contextlib.ExitStack) -> None:
        self._chosen, self._stack = chosen, stack
        self.said = Said()
        self._teams: dict[str, Team] = {}
        self._allowed: dict[str, dict[str, float]] = {}  # of each case's results, relative
        self._agreed: set[str] = set()
        self._files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longtrain-bench-")))

    @property
    def _ranks(self) -> Team:
        return self._team("ranks", self._chosen.processes, threads=_threads(self._chosen))

    @property
    def _single(self) -> Team:
        return self._team("single", 1, threads=_threads(self._chosen) * self._chosen.processes)

    def _team(self, name: str, processes: int, *, threads: int) -> Team:
        if name not in self._teams:
            team = Team(WORKER, processes, threads=threads, device=self._chosen.device)
            self._teams[name] = self._stack.enter_context(team)
        return self._teams[name]

    # ---- the parts -------------------------------------------------------------------------------------------------

    def scaling(self) -> None:
        """One document, every layout and strategy, beside one process."""
        chosen = self._chosen
        sides = [(layout, strategy) for strategy in chosen.strategies for layout in LAYOUTS]
        self._agree("one", chosen.case(), sides)
        best = in_turn({"SDPA": (self._single, "one"), **self._timed("one", sides)}, repeats=chosen.repeats)
        rows = [["SDPA, one process", "", "", f"{best['SDPA']:.3f}", "1", ""]]
        for layout, strategy in sides:
            seconds = best[f"{layout} {strategy}"]
            bar = f">= {SCALING_BAR}" if layout != "contiguous" and chosen.device == "cpu" else ""
            ratio = best["SDPA"] / seconds / self._share
            rows.append(["longtrain", layout, strategy, f"{seconds:.3f}", f"{ratio:.3f}", bar])
        self.said.say(
            "## One causal document\n\n"
            + table(["attention", "layout", "strategy", "seconds", f"throughput {self._per}", "bar"], rows)
        )

    def packed(self) -> None:
        """The nine mixed documents, beside the ideal for their visible pairs."""
        chosen = self._chosen
        documents = _documents(chosen.length)
        sides = [(layout, strategy) for strategy in chosen.strategies for layout in PACKED_LAYOUTS]
        self._agree("one", chosen.case(), [])
        self._agree("packed", chosen.case(documents=documents), sides)
        teams = {"SDPA": (self._single, "one"), "SDPA by document": (self._single, "packed")}
        best = in_turn({**teams, **self._timed("packed", sides)}, repeats=chosen.repeats)
        rate = _pairs([chosen.length]) / best["SDPA"]
        ideal = _pairs(documents) / rate / self._share
        rows = [["ideal", "", "", f"{ideal:.3f}", "1", ""]]
        rows.append(["SDPA by document, one process", "", "", f"{best['SDPA by document']:.3f}", "", ""])
        rows[1][4] = f"{ideal * self._share / best['SDPA by document']:.3f}"
        for layout, strategy in sides:
            seconds = best[f"{layout} {strategy}"]
            bar = f">= {PACKED_BAR}" if layout == "balanced" and chosen.device == "cpu" else ""
            rows.append(["longtrain", layout, strategy, f"{seconds:.3f}", f"{ideal / seconds:.3f}", bar])
        self.said.say(
            f"## Packed documents\n\nLengths {', '.join(map(str, documents))}: {_pairs(documents):,} visible pairs, "
            f"{_pairs(documents) / _pairs([chosen.length]):.3f} of one document's. The ideal is the time that one "
            f"process's SDPA would need for as many pairs at its rate on one causal document, {rate / 1e6:,.1f} "
            f'million pairs/s forward and backward ({best["SDPA"]:.3f} s){self._devices}.\n\n"zigzag to balanced": '
            "q, k, v of a sequence on zigzag move to balanced and the output back, as a hybrid's softmax layers may. "
            f"Asked to choose, the cost model takes {self._choices(documents)}.\n\n"
            + table(["attention", "layout", "strategy", "seconds", "of the ideal", "bar"], rows)
        )

    def rival(self) -> None:
        """ring-attention-pytorch on the same processes and inputs."""
        chosen = self._chosen
        version = self._ranks.ask("rival")[0]["version"]
        if version is None:
            self.said.say(
                f"ring-attention-pytorch is not installed and was not measured; it would be with: {INSTALL_RIVAL}"
            )
            return
        ours = ("zigzag", chosen.strategies[0])
        self._agree("one", chosen.case(), [ours])
        errors = {}
        small = chosen.case(min(chosen.length, 256) // chosen.processes * chosen.processes)
        kinds = {"ring-attention-pytorch": {"kind": "rival"}, "longtrain": _longtrain(*ours)}
        for name, kind in kinds.items():
            self._ranks.ask("prepare", {"side": f"small {name}", "case": small, **kind})
            answers = self._ranks.ask("small_truth", {"side": f"small {name}", "case": small})
            errors[name] = deviations(*(answer["squares"] for answer in answers))
        self._ranks.ask("prepare", {"side": "rival", "kind": "rival", "case": chosen.case()})
        best = in_turn(
            {**self._timed("one", [ours]), "ring-attention-pytorch": (self._ranks, "rival")}, repeats=chosen.repeats
        )
        mine, other = best[" ".join(ours)], best["ring-attention-pytorch"]
        bar = f">= {RIVAL_BAR:g}" if chosen.device == "cpu" else ""
        names = list(errors["longtrain"])
        rows = [
            ["ring-attention-pytorch", f"{other:.3f}", "1", ""],
            [f"longtrain, {' '.join(ours)}", f"{mine:.3f}", f"{other / mine:.2f} x faster", bar],
        ]
        wrong = max(names, key=lambda name: errors["ring-attention-pytorch"][name])
        verdict = "**Its gradients are wrong**" if errors["ring-attention-pytorch"][wrong] > 1e-2 else "Its errors"
        self.said.say(
            f"## ring-attention-pytorch {version}\n\nThe same {chosen.processes} processes and inputs; its ring over "
            "contiguous shards, its default bucket of 1024 tokens, its path for devices without CUDA.\n\n"
            + table(["attention", "seconds", "forward and backward", "bar"], rows)
            + f"\n\n{verdict}: relative error against dense attention in float64, T = {small['length']}, the loss's "
            "gradient random:\n\n"
            + table(
                ["attention", *names],
                [[name, *(f"{errors[name][result]:.1e}" for result in names)] for name in errors],
            )
        )

    def memory(self) -> None:
        """Peak bytes per rank at one length, and at one length per rank."""
        chosen = self._chosen
        length, each = chosen.length // 2, chosen.length // 8
        cases = [(world, length) for world in WORLDS] + [(world, world * each) for world in GROWING_WORLDS]
        if chosen.device != "cpu":
            cases = [(world, tokens) for world, tokens in cases if world <= chosen.processes]
        strategy = chosen.strategies[0]
        peaks: dict[tuple[int, int], int] = {}
        for world in sorted({world for world, _ in cases}):
            with Team(WORKER, world, threads=1, device=chosen.device) as team:
                for tokens in sorted({tokens for one, tokens in cases if one == world}):
                    case = chosen.case(tokens) | {
                        "heads": MEMORY_HEADS,
                        "kv_heads": MEMORY_KV_HEADS,
                        "width": MEMORY_WIDTH,
                    }
                    answers = team.ask("memory", {"case": case, "layout": "zigzag", "strategy": strategy})
                    peaks[world, tokens] = max(answer["bytes"] for answer in answers)
        first = [case for case in cases if case[1] == length][: len(WORLDS)]
        rows = []
        for world, tokens in first:
            bar = f"<= {MEMORY_BAR:.2f}" if world == 4 else ""
            share = peaks[world, tokens] / peaks[first[0]]
            rows.append([str(world), f"{tokens / world:g}", f"{peaks[world, tokens] / 2**20:.2f}", f"{share:.3f}", bar])
        text = table(["ranks", "tokens each", "MiB", f"of {first[0][0]} rank", "bar"], rows)
        growing = cases[len(first) :]
        if growing:
            base = peaks[growing[0]]
            grown = [
                [str(world), str(each), f"{peaks[world, tokens] / 2**20:.2f}", f"{peaks[world, tokens] / base:.3f}"]
                for world, tokens in growing
            ]
            text += "\n\n" + table(["ranks (ring steps)", "tokens each", "MiB", f"of {growing[0][0]} ranks"], grown)
        self.said.say(
            f"## Peak memory of a rank\n\nBytes of all tensors of a rank's forward and backward call at its peak: its "
            f"q, k, v and dout, results, and all that lives in between. zigzag, {strategy}, H {MEMORY_HEADS}, "
            f"G {MEMORY_KV_HEADS}, K {MEMORY_WIDTH}, {chosen.dtype}. At one length per rank it should not grow with "
            "the steps of the ring.\n\n" + text
        )

    def virtual(self) -> None:
        """Layouts' critical paths over W ranks, without messages, on one device."""
        chosen, world = self._chosen, self._chosen.virtual
        rows = []
        for layout in LAYOUTS:
            case = {"case": chosen.case(), "layout": layout, "world": world, "repeats": chosen.repeats}
            (path,) = self._single.ask("virtual", case)
            total = path["forward"] + path["backward"]
            rows.append([layout, *(f"{path[name]:.3f}" for name in ("forward", "backward")), f"{total:.3f}"])
            rows[-1] += [f"{total / path['even']:.3f}", f"{path['pairs']:.3f}"]
        fastest = min(float(row[3]) for row in rows)
        rows = [[*row, f"{float(row[3]) / fastest:.2f}"] for row in rows]
        header = ["layout", "forward s", "backward s", "sum s", "over even", "pairs over even", "of the fastest"]
        self.said.say(
            f"## The critical path of {world} ranks, played by one\n\nThe sum over the ring's steps of the slowest "
            "rank's kernel time, without any message; even: all ranks' time shared out evenly; pairs: the same in "
            "visible pairs.\n\n" + table(header, rows)
        )

    # ---- measuring -------------------------------------------------------------------------------------------------

    @property
    def _share(self) -> int:
        """Devices that the processes have for each one that the single process has."""
        return 1 if self._chosen.device == "cpu" else self._chosen.processes

    def _choices(self, documents: Sequence[int]) -> str:
        """What the cost model makes of the packed case on the home layouts of hybrids, in words."""
        case, said = self._chosen.case(documents=documents), []
        for home in ("zigzag", "contiguous"):
            answer = self._ranks.ask("choice", {"case": case, "home": home, "strategy": self._chosen.strategies[0]})[0]
            said.append(f"{answer['layout']} for {home}")
        return " and ".join(said)

    @property
    def _per(self) -> str:
        return "of SDPA's" if self._share == 1 else f"of SDPA's, for each of {self._share} devices"

    @property
    def _devices(self) -> str:
        return "" if self._share == 1 else f", shared by {self._share} devices"

    def _timed(self, case: str, sides: Sequence[Side]) -> dict[str, tuple[Team, str]]:
        return {" ".join(side): (self._ranks, f"{case} {' '.join(side)}") for side in sides}

    def _agree(self, name: str, case: Mapping[str, Any], sides: Sequence[Side]) -> None:
        """Prepare the single process and some sides for a case, and see that they all have the same results.

        These runs are the warm-up too.

        Raises:
            Disagreement: a side's results are farther from SDPA's than `BUDGET` allows.
        """
        file = str(self._files / name)
        if name not in self._allowed:
            (prepared,) = self._single.ask("prepare", {"side": name, "kind": "single", "case": case})
            (answer,) = self._single.ask("reference", {"side": name, "file": file})
            self._allowed[name] = {result: BUDGET * loss for result, loss in answer["losses"].items()}
            kernel = "" if prepared["backend"] is None else f" ({prepared['backend']})"
            print(f"SDPA{kernel}, {name}: loses {listed(answer['losses'])} to its dtype", flush=True)
        for layout, strategy in sides:
            side = f"{name} {layout} {strategy}"
            if side in self._agreed:
                continue
            self._ranks.ask("prepare", {"side": side, "case": case, **_longtrain(layout, strategy)})
            answers = self._ranks.ask("compare", {"side": side, "file": file})
            found = deviations(*(answer["squares"] for answer in answers))
            check_agreement(side, found, self._allowed[name])
            self._agreed.add(side)
            print(f"{side}: deviates from SDPA by {listed(found)}", flush=True)


def _longtrain(layout: str, strategy: str) -> dict[str, str]:
    return {"kind": "longtrain", "layout": layout, "strategy": strategy}


def _threads(chosen: Options) -> int:
    """Threads of each rank; the single process has as many as all ranks together."""
    return max(1, cores() // chosen.processes)


def _documents(length: int) -> list[int]:
    """`NINE_MIXED` in proportion to a length, whole tokens that sum to it."""
    ends = [round(sum(NINE_MIXED[: n + 1]) * length / sum(NINE_MIXED)) for n in range(len(NINE_MIXED))]
    return [stop - start for start, stop in zip([0, *ends], ends, strict=False)]


def _pairs(documents: Sequence[int]) -> int:
    """Visible (query, key) pairs of causal documents."""
    return sum(tokens * (tokens + 1) // 2 for tokens in documents)


def _setting(chosen: Options) -> str:
    """Title, hardware, shapes and how it is measured."""
    on_cpu = chosen.device == "cpu"
    threads, processes = _threads(chosen), chosen.processes
    single = f"one process x {threads * processes} threads" if on_cpu else "one process on one device"
    rows = [
        *machine_rows(chosen.device),
        ["shapes", f"B 1, T {chosen.length}, H {chosen.heads}, G {chosen.kv_heads}, K {chosen.width}, {chosen.dtype}"],
        ["longtrain", f"{processes} processes" + (f" x {threads} threads" if on_cpu else ", a device each")],
        ["beside", f"`torch.nn.functional.scaled_dot_product_attention`, {single}, dense [B, H, T, K]"],
        ["measured", "forward and backward pass of the attention call, causal; plans are made once before, per batch"],
        [
            "method",
            f"all workers alive, in turn, {chosen.repeats} times each after one run of warm-up, best of each",
        ],
        [
            "checked first",
            f"longtrain's out, dq, dk, dv against SDPA's, within {BUDGET:g} x what SDPA loses to its dtype",
        ],
    ]
    if not on_cpu:
        rows.append(["bars", "none: the project's bars are for CPUs"])
    where = "a CPU" if on_cpu else f"{processes} GPU{'s' if processes > 1 else ''}"
    today = datetime.date.today().isoformat()
    note = "GPUs were not measured." if on_cpu else ""
    text = f"# Sequence-parallel attention on {where}\n\n`{chosen.command}`, {today}. {note}".rstrip()
    return f"{text}\n\n{table(['what', 'setting'], rows)}"
