"""The longest sequences that fit into so much memory, measured beside planned: `longtrain bench training --longest`.

A length fits where the fullest device holds no more than was given. On a GPU that is what tensors hold and what a plan
counts for a driver beside. A process on a CPU holds an interpreter and libraries too: what counts there is what it
holds more than with 1,024 tokens, and the plan of these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from longtrain.errors import UsageError
from longtrain.launch.benchmarking import table
from longtrain.planning import Devices, longest, plan
from longtrain.planning.terms import CONTEXT

UNIT = 1024  # tokens: lengths are multiples
SHARE = 16  # a length is found to one part in so many

Held = Callable[[int, int], int | None]
"""Bytes that the fullest of so many devices holds at a length, by a run; None where the run failed."""


@dataclass(frozen=True)
class Longest:
    """The longest sequence of so many devices; None where not even 1,024 tokens fit."""

    devices: int
    planned: int | None
    measured: int | None


def find(fits: Callable[[int], bool], start: int) -> int | None:
    """The largest multiple of 1,024 tokens that fits, to one part in 16, searched from `start` on; None: none does."""
    fitting, over, tried, step = 0, None, max(1, start // UNIT), max(1, start // UNIT // 8)
    while over is None or over - fitting > max(1, over // SHARE):
        if fits(tried * UNIT):
            fitting = tried
        else:
            over = tried
        if over is None:
            tried, step = fitting + step, 2 * step
        elif fitting == 0 and over > step + 1:
            tried, step = over - step, 2 * step
        else:
            tried = max(1, (fitting + over) // 2)
    return fitting * UNIT or None


def measured(
    recipe: str, overrides: Sequence[str], devices: Sequence[Devices], *, memory: float, held: Held
) -> list[Longest]:
    """For each number of devices that share a sequence, the longest by plan and by runs.

    memory: bytes of a device. held: makes the runs.

    Raises:
        UsageError: a run of 1,024 tokens failed.
    """
    found = []
    for given in devices:
        limited = Devices(given.count, replace(given.device, memory=memory))
        keys = [*overrides, *shared_by(given.count)]
        best = longest(recipe, keys, limited)
        planned = None if best is None else best.recipe.data.length
        least = held(given.count, UNIT)
        if least is None:
            raise UsageError(f"--longest: a run of {UNIT:,} tokens on {given.count} devices failed")
        beside = CONTEXT
        if given.device.architecture is None:
            beside = plan(recipe, [*keys, f"data.length={UNIT}"], limited).memory.total - least
        runs: dict[int, int | None] = {UNIT: least}

        def fits(
            length: int, count: int = given.count, runs: dict[int, int | None] = runs, more: float = beside
        ) -> bool:
            if length not in runs:
                runs[length] = held(count, length)
            size = runs[length]
            return size is not None and size + more <= memory

        found.append(Longest(given.count, planned, find(fits, planned or UNIT)))
    return found


def shared_by(count: int) -> tuple[str, ...]:
    """The keys of a run whose sequence so many devices share."""
    return f"parallel.sequence={count}", "parallel.data=1", "launch.launcher=local"


def rows(found: Sequence[Longest], memory: float) -> str:
    """The table of what was found."""
    header = ["devices that share a sequence", "planned", "measured", "measured / planned"]
    lines = [
        [str(one.devices), *(_length(n) for n in (one.planned, one.measured)), _ratio(one.measured, one.planned)]
        for one in found
    ]
    return f"Longest T in {memory / 2**30:g} GiB a device:\n\n{table(header, lines)}"


def as_data(found: Sequence[Longest]) -> Mapping[str, dict[str, int | None]]:
    """The same for JSON, by the number of devices."""
    return {str(one.devices): {"planned": one.planned, "measured": one.measured} for one in found}


def _length(tokens: int | None) -> str:
    return "–" if tokens is None else f"{tokens:,}"


def _ratio(some: int | None, others: int | None) -> str:
    return "–" if some is None or others is None else f"{some / others:.2f}"
