"""How `longtrain bench mixers` measures sides at T, 2T, 4T ... over some ranks, until time or memory end a line."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from longtrain.launch.benchmarking import in_turn, table
from longtrain.launch.mixers_options import SOFTMAX, Options
from longtrain.launch.team import Team

GIB = 2**30
OTHER_PASSES = 4  # that a line takes at one T besides those that are timed: the warm-up, and one with its memory traced


@dataclass(frozen=True)
class Point:
    """One side at one length: seconds of a forward and backward pass, and the most bytes of any rank."""

    seconds: float
    peak: int  # held at the peak
    forward: int  # received in a forward pass
    backward: int


@dataclass
class Line:
    """A side over some ranks, by T; end: why it goes no further."""

    name: str
    ranks: int
    points: dict[int, Point] = field(default_factory=dict)
    end: str = ""
    spent: float = 0.0  # seconds, of all measurements

    @property
    def speeds(self) -> dict[int, float]:
        """Tokens per second by T."""
        return {length: length / point.seconds for length, point in self.points.items()}


class Growth:
    """Measures lines over the ranks of one team."""

    def __init__(self, chosen: Options, team: Team, ranks: int) -> None:
        self._chosen, self._team, self._ranks = chosen, team, ranks
        self._room = self._bytes_of_a_rank()

    def measure(self, kind: str, refused: Mapping[str, str | None]) -> list[Line]:
        """Lines of all names; those that are refused, with the reason, stay empty."""
        lines = [Line(name, self._ranks, end=reason or "") for name, reason in refused.items()]
        length = self._chosen.shortest
        if first := next((line.name for line in lines if not line.end), None):
            # The first use of what counts memory takes long: in no line's time.
            self._team.ask("memory", {"case": self._chosen.case(kind, first, length)})
        while growing := [line for line in lines if not line.end]:
            self._at(kind, growing, length)
            length *= 2
            for line in growing:
                line.end = self._end(line, length)
                if line.end:
                    print(f"{kind} {line.name}, {self._ranks} ranks: not at T {length:,}: {line.end}", flush=True)
        return lines

    def _at(self, kind: str, lines: Sequence[Line], length: int) -> None:
        """Measure some lines at one length, in turn."""
        print(f"T {length:,}, {self._ranks} rank{'s' * (self._ranks > 1)}:", flush=True)
        cases = {line.name: self._chosen.case(kind, line.name, length) for line in lines}
        took = dict.fromkeys(cases, 0.0)
        for name, case in cases.items():
            start = time.perf_counter()
            self._team.ask("prepare", {"side": name, "case": case})
            took[name] += time.perf_counter() - start
        best = in_turn({name: (self._team, name) for name in cases}, repeats=self._chosen.repeats)
        received = {name: self._team.ask("received", {"side": name}) for name in cases}
        self._team.ask("forget")
        for line in lines:
            start = time.perf_counter()
            peak = max(answer["bytes"] for answer in self._team.ask("memory", {"case": cases[line.name]}))
            line.spent += took[line.name] + time.perf_counter() - start + self._chosen.repeats * best[line.name]
            passes = {way: max(answer[way] for answer in received[line.name]) for way in ("forward", "backward")}
            line.points[length] = Point(best[line.name], peak, **passes)

    def _end(self, line: Line, length: int) -> str:
        """Why a line is not measured at a length, twice its last one; "" where it is."""
        chosen = self._chosen
        if chosen.longest is not None and length > chosen.longest:
            return f"beyond T {chosen.longest:,}"
        if line.name == SOFTMAX and length > chosen.softmax_longest:
            return f"softmax beyond T {chosen.softmax_longest:,}"
        *before, last = line.points.values()
        time = line.spent + (chosen.repeats + OTHER_PASSES) * last.seconds * _growth(
            [p.seconds for p in before], last.seconds
        )
        if time > chosen.seconds:
            return f"time, {time:.1f} s"
        peak = last.peak * _growth([point.peak for point in before], last.peak)
        if peak > self._room:
            return f"memory, {peak / GIB:.1f} GiB a rank"
        return ""

    def _bytes_of_a_rank(self) -> float:
        """What a rank may hold."""
        from longtrain.run_folder import environment

        share = self._ranks if self._chosen.device == "cpu" else 1
        if self._chosen.memory is not None:
            return self._chosen.memory * GIB / share
        if self._chosen.device == "cpu":
            return environment()["memory_bytes"] / 2 / share
        return 0.7 * min(answer["bytes"] for answer in self._team.ask("room"))


def _growth(before: Sequence[float], last: float) -> float:
    """By how much a quantity grows when T doubles: as it did last, between linear and quadratic."""
    return min(4.0, max(2.0, last / before[-1])) if before else 2.0


def tables(lines: Sequence[Line], *, ranks: Sequence[int], beside: str | None) -> str:
    """Speed, memory and messages of lines, by T; beside: the line that the speeds are also divided by."""
    lengths = sorted({length for line in lines for length in line.points})
    header = ["name", "ranks", *(f"T {length:,}" for length in lengths)]
    order = {name: place for place, name in enumerate(dict.fromkeys(line.name for line in lines))}
    lines = sorted(lines, key=lambda line: (order[line.name], ranks.index(line.ranks)))
    texts = [
        "Tokens per second:",
        table([*header, "ends at"], [[*row, end] for row, end in _rows(lines, lengths, "speed")]),
    ]
    if beside is not None:
        slow = {line.ranks: line.speeds for line in lines if line.name == beside}
        rows = [
            [line.name, str(line.ranks), *(_ratio(line.speeds, slow.get(line.ranks, {}), length) for length in lengths)]
            for line in lines
            if line.name != beside
        ]
        texts += [f"Times the tokens per second of {beside} over the same ranks:", table(header, rows)]
    texts += [
        "Peak memory of a rank, MiB, its inputs and gradients included:",
        table(header, [row for row, _ in _rows(lines, lengths, "memory")]),
    ]
    several = [line for line in lines if line.ranks > 1]
    if several:
        texts += [
            "Received by a rank, KiB, forward + backward (on a CPU with the handshake of each call, 32 bytes a rank):",
            table(header, [row for row, _ in _rows(several, lengths, "received")]),
        ]
    return "\n\n".join(texts)


def _rows(lines: Sequence[Line], lengths: Sequence[int], what: str) -> list[tuple[list[str], str]]:
    return [
        ([line.name, str(line.ranks), *(_cell(line.points.get(length), length, what) for length in lengths)], line.end)
        for line in lines
    ]


def _cell(point: Point | None, length: int, what: str) -> str:
    if point is None:
        return ""
    if what == "speed":
        return f"{length / point.seconds:,.0f}"
    if what == "memory":
        return f"{point.peak / 2**20:,.1f}"
    return f"{point.forward / 1024:,.1f} + {point.backward / 1024:,.1f}"


def _ratio(speeds: Mapping[int, float], beside: Mapping[int, float], length: int) -> str:
    return f"{speeds[length] / beside[length]:.2f}" if length in speeds and length in beside else ""
