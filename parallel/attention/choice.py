"""Which strategy a call runs: what the caller names, or for "auto" what the cost model finds fastest."""

import torch

from longtrain.parallel.attention.call import Window
from longtrain.parallel.attention.cost import Estimate, Heads, degrees, estimates, hardware_of
from longtrain.parallel.shard import SequenceShard

STRATEGIES = ("auto", "ring", "allgather", "ulysses", "mesh")
"""What `sequence_parallel_attention` takes as its strategy."""


def choose(
    strategy: str,
    ulysses_degree: int | None,
    *,
    sizes: Heads,
    device: torch.device,
    shard: SequenceShard,
    key_shard: SequenceShard,
    causal: bool,
    window: Window,
) -> tuple[str, int]:
    """("ring" or "gather", the Ulysses degree): what runs. Host arithmetic, the same on every rank."""
    if strategy == "allgather":
        return "gather", 1
    if strategy == "ring" or shard.world == 1:
        return "ring", 1
    if strategy == "ulysses":
        return "ring", shard.world
    if ulysses_degree is not None:
        return "ring", ulysses_degree
    kept = shard.plans.setdefault(key_shard, {})
    key = ("choice", strategy, sizes, device.type, causal, window)
    if key not in kept:
        found = estimates(shard, key_shard, sizes, causal=causal, window=window, hardware=hardware_of(device))
        best = possible(found, strategy, ulysses_degree, ranks=shard.world)[0]
        kept[key] = "gather" if best.strategy == "allgather" else "ring", best.degree
    return kept[key]


def possible(found: list[Estimate], strategy: str, ulysses_degree: int | None, *, ranks: int) -> list[Estimate]:
    """Those of the estimates that a strategy and degree leave to choose from, in the same order."""
    if strategy == "auto":
        return found
    if strategy != "mesh":
        return [row for row in found if row.strategy == strategy]
    found = [row for row in found if row.strategy != "allgather"]
    if ulysses_degree is not None:
        return [row for row in found if row.degree == ulysses_degree]
    return [row for row in found if 1 < row.degree < ranks] or found  # a true mesh where there is one


def check_strategy_types(strategy: object, ulysses_degree: object) -> None:
    """Refuse, with a ValueError, what is no strategy or no degree, whatever the heads and ranks."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(map(repr, STRATEGIES))}")
    if ulysses_degree is None:
        return
    if isinstance(ulysses_degree, bool) or not isinstance(ulysses_degree, int) or ulysses_degree < 1:
        raise ValueError(f"ulysses_degree: got {ulysses_degree!r}, expected a number of ranks from 1 on, or None")


def check_heads_at_once(heads_at_once: object) -> None:
    """Refuse, with a ValueError, what is no number of heads."""
    if heads_at_once is None:
        return
    if isinstance(heads_at_once, bool) or not isinstance(heads_at_once, int) or heads_at_once < 1:
        raise ValueError(f"heads_at_once: got {heads_at_once!r}, expected a number of key heads from 1 on, or None")


def check_strategy(strategy: str, ulysses_degree: int | None, *, heads: int, ranks: int, rows: int) -> None:
    """Refuse, with a ValueError, a strategy or degree that so many query heads and ranks, in rows, do not allow."""
    inner = ranks // rows
    allowed = degrees(inner, heads)
    works = "'ring' and 'allgather' work with any heads"
    if strategy == "ulysses" and rows > 1:
        raise ValueError(
            f"strategy: got 'ulysses' over a mesh of {rows} x {inner} ranks, expected a group of one "
            "dimension; 'mesh' runs Ulysses inside the rows and a ring between them"
        )
    if strategy == "ulysses" and heads % ranks:
        raise ValueError(
            f"strategy: got 'ulysses' with H = {heads} query heads over {ranks} ranks, which does not divide; "
            f"'mesh' works with ulysses_degree {_listed(allowed)}, {works}"
        )
    if ulysses_degree is None:
        return
    fixed = {"ring": 1, "allgather": 1, "ulysses": ranks}.get(strategy)
    if strategy == "auto":
        raise ValueError(f"ulysses_degree: got {ulysses_degree} with strategy 'auto', expected None; 'mesh' takes it")
    if fixed is not None and ulysses_degree != fixed:
        raise ValueError(
            f"ulysses_degree: got {ulysses_degree} with strategy {strategy!r}, expected None or {fixed}; "
            "'mesh' takes others"
        )
    if strategy == "mesh" and ulysses_degree not in allowed:
        raise ValueError(
            f"ulysses_degree: got {ulysses_degree} with H = {heads} query heads and {inner} ranks"
            f"{' in a row' if rows > 1 else ''}, expected a divisor of both: {_listed(allowed)}"
        )


def _listed(degrees: list[int]) -> str:
    return ", ".join(map(str, degrees))
