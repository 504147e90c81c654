"""Options of `longtrain bench attention`: their defaults and checks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longtrain.errors import UsageError
from longtrain.launch.benchmarking import DTYPES, accelerator, check_least, check_output, names

PARTS = ("scaling", "packed", "rival", "memory", "virtual")
STRATEGIES = ("ring", "allgather", "ulysses", "mesh", "auto")


@dataclass(frozen=True)
class Options:
    """What to measure; see `longtrain bench attention --help`."""

    length: int  # T, tokens
    heads: int
    kv_heads: int
    width: int
    dtype: str
    device: str  # "cpu", or the type of an accelerator
    processes: int
    repeats: int
    parts: tuple[str, ...]
    strategies: tuple[str, ...]
    virtual: int  # ranks that one process plays
    output: Path | None

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        words = {
            "length": self.length,
            "heads": self.heads,
            "kv-heads": self.kv_heads,
            "width": self.width,
            "dtype": self.dtype,
            "processes": self.processes,
            "repeats": self.repeats,
            "only": ",".join(self.parts),
            "strategy": ",".join(self.strategies),
        }
        if "virtual" in self.parts:
            words["virtual"] = self.virtual
        return "longtrain bench attention " + " ".join(f"--{name} {value}" for name, value in words.items())

    def case(self, length: int | None = None, documents: Sequence[int] = ()) -> dict[str, Any]:
        """The shapes of a case, as the workers take them."""
        fields = asdict(self)
        shapes = {name: fields[name] for name in ("heads", "kv_heads", "width", "dtype")}
        return {"length": length or self.length, **shapes, "documents": list(documents)}


def options(
    *,
    length: int | None,
    heads: int | None,
    kv_heads: int | None,
    width: int | None,
    dtype: str | None,
    device: str | None,
    processes: int | None,
    repeats: int,
    only: str | None,
    strategy: str | None,
    virtual: int | None,
    output: Path | None,
) -> Options:
    """Checked options; None takes the default, which on GPUs differs from that on a CPU.

    Raises:
        UsageError: a value that cannot work, alone or with the others.
    """
    kind, gpus = accelerator(device)
    usual = (65536, 32, 8, 128, "bfloat16", gpus) if gpus else (16384, 8, heads or 8, 64, "float32", 2)
    parts = names("only", only, PARTS, ("scaling", "packed", *(() if gpus else ("rival",)), "memory"))
    if virtual is not None or (gpus == 1 and only is None):
        parts = parts if "virtual" in parts else (*parts, "virtual")
    chosen = Options(
        length=usual[0] if length is None else length,
        heads=usual[1] if heads is None else heads,
        kv_heads=usual[2] if kv_heads is None else kv_heads,
        width=usual[3] if width is None else width,
        dtype=usual[4] if dtype is None else dtype,
        device=kind,
        processes=usual[5] if processes is None else processes,
        repeats=repeats,
        parts=parts,
        strategies=names("strategy", strategy, STRATEGIES, STRATEGIES[:4] if gpus else STRATEGIES[:1]),
        virtual=8 if virtual is None else virtual,
        output=output,
    )
    _check(chosen, gpus)
    return chosen


def _check(chosen: Options, gpus: int) -> None:
    least = {"length": 128, "heads": 1, "kv_heads": 1, "width": 1, "processes": 1, "repeats": 1, "virtual": 1}
    check_least(chosen, least)
    if chosen.dtype not in DTYPES:
        raise UsageError(f"--dtype: got {chosen.dtype!r}, expected one of {', '.join(DTYPES)}")
    if chosen.heads % chosen.kv_heads:
        raise UsageError(f"--kv-heads: got {chosen.kv_heads}, expected a divisor of the {chosen.heads} heads")
    if chosen.processes > 64 or (gpus and chosen.processes > gpus):
        raise UsageError(f"--processes: got {chosen.processes}, expected at most {gpus or 64} on this machine")
    if "ulysses" in chosen.strategies and chosen.heads % chosen.processes:
        raise UsageError(
            f"--strategy: got ulysses with {chosen.heads} heads over {chosen.processes} processes, which does not "
            "divide; mesh would work"
        )
    if "rival" in chosen.parts and chosen.length % chosen.processes:
        raise UsageError(f"--length: got {chosen.length}, expected a multiple of the {chosen.processes} processes")
    check_output(chosen.output)
