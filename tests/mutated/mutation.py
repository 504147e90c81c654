"""What a mutation is; the other files of this folder list them, and `tests/mutations.py` makes them."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutation(NamedTuple):
    """In `file`, `old`, which is there once, becomes `new`; then one of `tests` (pytest's node ids) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def misfit(mutation: Mutation, root: Path = ROOT) -> str:
    """Why a mutation cannot be made in the code below `root`; "" where it can."""
    path = root / mutation.file
    if not path.is_file():
        return f"{mutation.name}: there is no {mutation.file}"
    count = path.read_text(encoding="utf-8").count(mutation.old)
    if count != 1:
        return f"{mutation.name}: in {mutation.file} its old text occurs {count} times, not once: {mutation.old!r}"
    return f"{mutation.name}: changes nothing" if mutation.old == mutation.new else ""
