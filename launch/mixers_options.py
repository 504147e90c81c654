"""Options of `longtrain bench mixers`: their defaults and checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrain.errors import UsageError, nearest
from longtrain.launch.benchmarking import DTYPES, accelerator, check_least, check_output, names
from longtrain.launch.local import cores

PARTS = ("operators", "mixers", "scaling")
LAYOUTS = ("natural", "contiguous", "zigzag")
SOFTMAX = "softmax"  # the operator and the mixer whose time per token grows with T
MOST_RANKS = 64  # on a CPU


@dataclass(frozen=True)
class Options:
    """What to measure; see `longtrain bench mixers --help`."""

    parts: tuple[str, ...]
    operators: tuple[str, ...]
    mixers: tuple[str, ...]
    scaled_mixers: tuple[str, ...]  # those in the part "scaling": the ones that were asked for by name
    ranks: tuple[int, ...]  # how many share the sequence, one number after the other
    shortest: int  # T of the first measurement; then twice that, and so on
    longest: int | None  # None: until time or memory end it
    softmax_longest: int
    length: int  # T of the part "scaling"
    heads: int
    width: int
    dtype: str
    device: str  # "cpu", or the type of an accelerator
    layout: str
    strategy: str
    repeats: int
    seconds: float  # that one line, of a side over some ranks, may take
    memory: float | None  # GiB that a line may need: on a CPU all ranks together, else each; None: by what is there
    output: Path | None

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        words: dict[str, Any] = {"only": ",".join(self.parts)}
        if self.parts != ("mixers",):
            words["operators"] = ",".join(self.operators)
        if self.scaled_mixers or ("mixers" in self.parts and "scaling" not in self.parts):
            words["mixers"] = ",".join(self.mixers)
        if self.growing:
            words["ranks"] = ",".join(map(str, self.ranks))
            words |= {"shortest": self.shortest, "longest": self.longest, "softmax-longest": self.softmax_longest}
            words |= {"seconds": f"{self.seconds:g}", "memory": self.memory}
        if "scaling" in self.parts:
            words["length"] = self.length
        words |= {name: getattr(self, name) for name in ("heads", "width", "dtype", "layout", "strategy", "repeats")}
        words["device"] = "cpu" if self.device == "cpu" else "gpu"
        given = {name: value for name, value in words.items() if value is not None}
        return "longtrain bench mixers " + " ".join(f"--{name} {value}" for name, value in given.items())

    @property
    def growing(self) -> bool:
        """Whether there is a part in which T grows."""
        return bool({"operators", "mixers"} & set(self.parts))

    @property
    def processes(self) -> int:
        """Of the part "scaling": two on a CPU, otherwise the most ranks."""
        return 2 if self.device == "cpu" else max(self.ranks)

    def threads(self, ranks: int) -> int:
        """CPU threads of each of so many ranks."""
        return max(1, cores() // ranks)

    def case(self, kind: str, name: str, length: int) -> dict[str, Any]:
        """A case, as the workers take it."""
        shapes = {field: getattr(self, field) for field in ("heads", "width", "dtype", "layout", "strategy")}
        return {"kind": kind, "name": name, "length": length, **shapes}


def options(
    *,
    only: str | None,
    operators: str | None,
    mixers: str | None,
    ranks: str | None,
    shortest: int,
    longest: int | None,
    softmax_longest: int | None,
    length: int,
    heads: int | None,
    width: int | None,
    dtype: str | None,
    device: str | None,
    layout: str,
    strategy: str,
    repeats: int,
    seconds: float,
    memory: float | None,
    output: Path | None,
) -> Options:
    """Checked options; None takes the default, which on GPUs differs from that on a CPU.

    Raises:
        UsageError: a value that cannot work, alone or with the others.
    """
    from longtrain.bench_mixers.layers import NAMES
    from longtrain.bench_mixers.operators import OPERATORS, STRATEGIES

    kind, gpus = accelerator(device)
    usual = (16, 128, "bfloat16", 65536) if gpus else (4, 64, "float32", 16384)
    chosen_mixers = names("mixers", mixers, NAMES, NAMES)
    chosen = Options(
        parts=names("only", only, PARTS, PARTS[:2]),
        operators=names("operators", operators, tuple(OPERATORS), tuple(OPERATORS)),
        mixers=chosen_mixers,
        scaled_mixers=() if mixers is None else chosen_mixers,
        ranks=_ranks(ranks, gpus),
        shortest=shortest,
        longest=longest,
        softmax_longest=usual[3] if softmax_longest is None else softmax_longest,
        length=length,
        heads=usual[0] if heads is None else heads,
        width=usual[1] if width is None else width,
        dtype=usual[2] if dtype is None else dtype,
        device=kind,
        layout=layout,
        strategy=strategy,
        repeats=repeats,
        seconds=seconds,
        memory=memory,
        output=output,
    )
    _check_choice("strategy", chosen.strategy, STRATEGIES)
    _check(chosen)
    return chosen


def _ranks(given: str | None, gpus: int) -> tuple[int, ...]:
    """Numbers of ranks: 1, 2, 4 ... up to all GPUs, or up to all cores and 4 at least."""
    most = gpus or MOST_RANKS
    if given is None:
        usual = gpus or min(MOST_RANKS, max(4, cores()))
        return tuple(2**power for power in range(usual.bit_length()))
    texts = [text.strip() for text in given.split(",")]
    for text in texts:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise UsageError(f"--ranks: got {text!r}, expected numbers from 1 to {most}, with commas between")
    return tuple(dict.fromkeys(map(int, texts)))


def _check(chosen: Options) -> None:
    check_least(chosen, {"shortest": 128, "length": 128, "heads": 1, "width": 2, "repeats": 1, "seconds": 0.1})
    if not math.isfinite(chosen.seconds):
        raise UsageError(f"--seconds: got {chosen.seconds}, expected a finite number")
    if chosen.memory is not None and not 0 < chosen.memory < math.inf:
        raise UsageError(f"--memory: got {chosen.memory}, expected GiB above 0")
    if chosen.longest is not None and chosen.longest < chosen.shortest:
        raise UsageError(f"--longest: got {chosen.longest}, expected {chosen.shortest} (--shortest) or more")
    if chosen.softmax_longest < chosen.shortest:
        raise UsageError(
            f"--softmax-longest: got {chosen.softmax_longest}, expected {chosen.shortest} (--shortest) or more"
        )
    _check_choice("dtype", chosen.dtype, DTYPES)
    _check_choice("layout", chosen.layout, LAYOUTS)
    if "scaling" in chosen.parts and chosen.processes < 2:
        raise UsageError("--only: got scaling, which needs two devices or --device cpu; operators,mixers would work")
    if chosen.output is not None and chosen.output.suffix == ".png":
        raise UsageError(f"--output: got {chosen.output}, expected a .md file; the plot is written beside it as .png")
    check_output(chosen.output)


def _check_choice(option: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise UsageError(f"--{option}: got {given!r}{nearest(given, known)}, expected one of {', '.join(known)}")
