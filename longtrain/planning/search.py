"""The longest sequence that fits, and the degrees, layout and policy with which a step is fastest."""

from collections.abc import Sequence

from longtrain.errors import UsageError
from longtrain.planning.devices import Devices
from longtrain.planning.planner import Change, Plan, plan

_MOST = 2**34
_LEAST = 2**20  # tokens: with as many, no option is refused for their number


def longest(name: str, overrides: Sequence[str], devices: Devices) -> Plan | None:
    """The plan with the largest data.length that fits, to 1 in 64; None where not even the shortest one does.

    The shortest one is 1,024 tokens, or the first double of it that the recipe can work with.
    """

    def at(blocks: int) -> Plan:
        return plan(name, [*overrides, f"data.length={blocks * 1024}"], devices)

    least, fits = 1, None
    while fits is None:
        try:
            fits = at(least)
        except UsageError:  # a window or a chunk that is longer, if not something else
            least *= 2
            if least * 1024 > _LEAST:
                raise
    too_long = 2 * least
    if not fits.fits:
        return None
    while too_long * 1024 <= _MOST and (more := at(too_long)).fits:
        fits, too_long = more, too_long * 2
    low = fits.recipe.data.length // 1024
    while too_long - low > max(1, low // 64):
        middle = (low + too_long) // 2
        tried = at(middle)
        fits, low, too_long = (tried, middle, too_long) if tried.fits else (fits, low, middle)
    return fits


def search(name: str, overrides: Sequence[str], devices: Devices, *, count: int = 5) -> list[Change]:
    """The fastest plans that fit, over data and sequence degrees, layouts and policies; as many as `count`."""
    found = []
    for sequence in (n for n in range(1, devices.count + 1) if devices.count % n == 0):
        for layout in ("zigzag", "contiguous"):
            for policy in ("none", "attention", "full"):
                change = (
                    f"parallel.sequence={sequence}",
                    f"parallel.data={devices.count // sequence}",
                    f"parallel.layout={layout}",
                    f"memory.recompute={policy}",
                )
                try:
                    planned = plan(name, [*overrides, *change], devices)
                except UsageError:
                    continue
                if planned.fits:
                    found.append(Change(change, planned))
    return sorted(found, key=lambda change: -change.plan.tokens_per_second)[:count]
