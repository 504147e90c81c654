"""What the launchers of benchmarks share: options, agreement before any number, turns, and markdown."""

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from longtrain.errors import UsageError, nearest
from longtrain.launch.local import cores
from longtrain.launch.team import Team

DTYPES = ("float32", "float64", "bfloat16", "float16")


class Disagreement(Exception):
    """A side's results are not those that they must be: nothing is timed."""


class Said:
    """Markdown that is printed as it comes, and kept for a file."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        """Print some markdown now, and keep it."""
        print(f"{text}\n", flush=True)
        self.texts.append(text)

    def write(self, file: Path | None) -> None:
        """Write all of it, unless there is no file."""
        if file is not None:
            file.write_text("\n\n".join(self.texts) + "\n", encoding="utf-8")


def accelerator(device: str | None) -> tuple[str, int]:
    """The type of device that `--device` means, and how many accelerators there are: ("cpu", 0) without any.

    Raises:
        UsageError: a device that is not there.
    """
    import torch

    gpus = torch.accelerator.device_count() if device != "cpu" and torch.accelerator.is_available() else 0
    if device not in (None, "cpu", "gpu"):
        raise UsageError(f"--device: got {device!r}, expected cpu or gpu")
    if device == "gpu" and not gpus:
        raise UsageError("--device: got gpu, but PyTorch finds none here; --device cpu would work")
    found = torch.accelerator.current_accelerator() if gpus else None
    return ("cpu" if found is None else found.type), gpus


def names(option: str, given: str | None, known: Sequence[str], usual: tuple[str, ...]) -> tuple[str, ...]:
    """The names of an option ``a,b``, `usual` without one; a UsageError for an unknown one, with the nearest."""
    chosen = usual if given is None else tuple(dict.fromkeys(name.strip() for name in given.split(",")))
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"--{option}: got {name!r}{nearest(name, known)}, expected names out of {', '.join(known)}, "
                "with commas between"
            )
    return chosen


def check_least(chosen: object, least: Mapping[str, float]) -> None:
    """Raise a UsageError for a field of the options that is below its least value."""
    for name, value in least.items():
        if not getattr(chosen, name) >= value:  # NaN too
            raise UsageError(f"--{name.replace('_', '-')}: got {getattr(chosen, name)}, expected {value} or more")


def check_output(output: Path | None) -> None:
    """Raise a UsageError for a file that could not be written for want of its folder."""
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output: got {output}, expected a file in a folder that exists")


def check_agreement(
    side: str, deviations: Mapping[str, float], allowed: Mapping[str, float], *, truth: str = "SDPA"
) -> None:
    """Raise a Disagreement that names the results that are farther from the truth than allowed (relative errors)."""
    wrong = [
        f"{name} by {deviations[name]:.1e}, more than {limit:.1e}"
        for name, limit in allowed.items()
        if not deviations[name] <= limit  # NaN is wrong too
    ]
    if wrong:
        raise Disagreement(f"{side} differs from {truth} in {'; '.join(wrong)}")


def in_turn(sides: Mapping[str, tuple[Team, str]], *, repeats: int) -> dict[str, float]:
    """Time each side, of a team, once, then each again ...; the best seconds of each, those of its slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(1, repeats + 1):
        for name, (team, side) in sides.items():
            times[name].append(max(answer["seconds"] for answer in team.ask("measure", {"side": side})))
            print(f"  {repeat}. {name:<24} {times[name][-1]:8.3f} s", flush=True)
    return {name: min(seconds) for name, seconds in times.items()}


def listed(numbers: Mapping[str, float]) -> str:
    """``out 1.0e-07, dq 2.0e-07``."""
    return ", ".join(f"{name} {number:.1e}" for name, number in numbers.items())


def machine_rows(device: str) -> list[list[str]]:
    """Rows of a table of settings: the day, and the hardware and software that this runs on."""
    from longtrain.run_folder import environment

    machine = environment()
    hardware = f"{machine['cpu']}, {cores()} cores" if device == "cpu" else ", ".join(machine["accelerators"])
    return [
        ["date", datetime.date.today().isoformat()],
        ["hardware", f"{hardware}, {machine['memory_bytes'] / 2**30:.0f} GiB of host memory"],
        ["software", f"Python {machine['python']}, torch {machine['torch']}, longtrain {machine['longtrain']}"],
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in a terminal too."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
