"""What all parts of the benchmark share: sides are checked, then timed in turn, and rows made of their times."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.bench_kernels import roofline
from longtrain.bench_kernels.report import Report, Row
from longtrain.bench_kernels.roofline import Work
from longtrain.bench_kernels.sides import Side, check, first_tokens, named, wider
from longtrain.bench_kernels.timing import Times, in_turn

UNITS = {"ms": 1e3, "s": 1.0}


@dataclass(frozen=True)
class Bar:
    """What a number is held against: at least `least` times the compared side's speed, or at most `most` seconds."""

    least: float | None = None
    most: float | None = None

    def of(self, ratio: float | None, seconds: float) -> tuple[str, bool | None]:
        if self.least is not None and ratio is not None:
            return f">= {self.least:g} x", ratio >= self.least
        if self.most is not None:
            return f"<= {1e3 * self.most:g} ms", seconds <= self.most
        return "", None


NO_BAR = Bar()


class Expected(NamedTuple):
    """Seconds: what no implementation can go below, and what ours is designed to come down to."""

    floor: float
    design: float


@dataclass
class Comparison:
    """Sides of one case, ours first by convention. Ratios are of speed: the fastest of `rivals` over each of `ours`."""

    part: str
    case: str
    sides: dict[str, Side]
    ours: Mapping[str, Bar]
    expected: Mapping[str, Expected] = field(default_factory=dict)  # by direction
    errors: dict[str, float] = field(default_factory=dict)


@dataclass
class Bench:
    """report: where rows go; repeats: samples of each side; shrink: divides lengths, for tests."""

    report: Report
    repeats: int
    shrink: int = 1

    @property
    def device(self) -> torch.device:
        return self.report.device

    @property
    def card(self) -> roofline.Card | None:
        """The one whose name the device bears."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((card for card in roofline.CARDS if card.name in name), None)

    def tokens(self, length: int) -> int:
        return max(64, length // self.shrink)

    def expected(self, works: Sequence[Work]) -> dict[str, Expected]:
        """What the roofline says of this card, forward, backward and both; nothing for an unknown card."""
        card = self.card
        if card is None:
            return {}
        found = {work.direction: Expected(work.floor(card), work.reachable(card)) for work in works}
        return found | {"both": Expected(*map(sum, zip(*found.values(), strict=True)))}

    def rival(self, name: str, make: Callable[[], Side]) -> dict[str, Side]:
        """The side that `make` makes, if it runs here; otherwise none, and a note that says why."""
        try:
            side = make()
            side.both()
        except Exception as error:  # whatever it is: a rival that cannot run must not end the measurements of ours
            reason = (str(error).strip() or "no message").splitlines()[0]
            self.report.note(f"{name}: {type(error).__name__}: {reason}: no comparison with it, no bar judged by it")
            return {}
        return {name: side}

    def on(self, card: str, bar: Bar) -> Bar:
        """A bar in seconds holds on the card that it was set for only."""
        return bar if self.card is not None and self.card.name == card and self.shrink == 1 else NO_BAR

    def check(self, this: Comparison, truth: Callable[..., Tensor], *, tokens: int) -> None:
        """See that on the first tokens our sides' results are those of `truth`, an operator, in a wider dtype."""
        for name, side in this.sides.items():
            if name not in this.ours:
                continue
            dout = None if side.dout is None else side.dout[:, :tokens] if side.dout.ndim >= 3 else side.dout
            short = Side(side.operator, first_tokens(side.inputs, tokens), dout)
            wide = wider(short.inputs)
            true = Side(truth, wide, None if dout is None else wider((dout,))[0].detach()).both()
            this.errors[name] = check(f"{this.part}, {this.case}, {name}", short.both(), true, dtype=_dtype(side))

    def agree(self, this: Comparison, *, also: Mapping[str, Side] | None = None) -> None:
        """See that at full size every side's results are those of the first. also: sides that are not timed."""
        (first, one), *others = (dict(this.sides) | dict(also or {})).items()
        true = one.both() if others else ()
        for name, side in others:
            error = check(f"{this.part}, {this.case}, {name} beside {first}", side.both(), true, dtype=_dtype(side))
            this.errors[name] = max(error, this.errors.get(name, 0.0))

    def time(
        self, this: Comparison, *, directions: Sequence[str], repeats: int | None = None, unit: str = "ms"
    ) -> None:
        """Time all sides in turn, each direction, and report them."""
        for direction in directions:
            calls = named(this.sides, direction)
            times = in_turn(calls, self.device, repeats=repeats or self.repeats)
            del calls
            self.rows(this, times, direction, unit)

    def rows(self, this: Comparison, times: Mapping[str, Times], direction: str, unit: str = "ms") -> None:
        rivals = {name: times[name].median for name in times if name not in this.ours}
        fastest = min(rivals.values(), default=None)
        for name, measured in times.items():
            ratio, text, met = None, "", None
            if name in this.ours:
                ratio = None if fastest is None else fastest / measured.median
                text, met = this.ours[name].of(ratio, measured.median)
            expected = this.expected.get(direction)
            row = Row(
                this.part,
                this.case,
                name,
                direction,
                measured.median * UNITS[unit],
                unit,
                samples=measured.samples,
                ratio=ratio,
                bar=text,
                met=met,
                error=this.errors.get(name),
                floor=None if expected is None else expected.floor * UNITS[unit],
                predicted=None if expected is None or name not in this.ours else expected.design * UNITS[unit],
            )
            self.report.add(row)


def with_bars(this: Comparison, bars: Mapping[str, Bar]) -> Comparison:
    """The same sides with other bars, for another direction."""
    return replace(this, ours=bars)


def _dtype(side: Side) -> torch.dtype:
    return next(x.dtype for x in side.inputs if x.requires_grad)
