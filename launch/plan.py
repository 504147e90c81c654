"""`longtrain plan`: what a recipe needs on named devices, and how fast it should be, before it is launched."""

import sys
from collections.abc import Sequence

from longtrain.dry_run import TERMS, Held
from longtrain.errors import UsageError
from longtrain.launch.dry_runs import dry_run
from longtrain.planning import Devices, Plan, devices_named, longest, plan, search
from longtrain.planning.planner import best_change, that_fit
from longtrain.planning.report import report, verdict

GIB = 2**30


def run(
    recipe: str, overrides: Sequence[str], *, devices: str, want_longest: bool, want_search: bool, dry: bool
) -> int:
    """Print the plan; 0, or 2 where it does not fit.

    Raises:
        UsageError: the recipe, or the devices, cannot be.
    """
    given = devices_named(devices)
    if want_longest and want_search:
        raise UsageError("--longest: got it with --search, expected one of them")
    if want_search and dry:
        raise UsageError("--dry-run: got it with --search, which proposes many; without --search it would work")
    if want_longest:
        return _longest(recipe, overrides, given, dry=dry)
    if want_search:
        return _search(recipe, overrides, given)
    planned = plan(recipe, overrides, given)
    print(report(planned), flush=True)
    if dry:
        print(f"\n{_dry(recipe, overrides, planned)}", flush=True)
    fitting = [] if planned.fits else that_fit(recipe, overrides, given)
    best = best_change(recipe, overrides, given) if planned.fits else None
    print(f"\n{verdict(planned, fitting, best)}")
    return 0 if planned.fits else 2


def _longest(recipe: str, overrides: Sequence[str], devices: Devices, *, dry: bool) -> int:
    found = longest(recipe, overrides, devices)
    if found is None:
        sys.stderr.write(f"longtrain: --longest: not even 1,024 tokens of {recipe} fit on {devices}\n")
        return 2
    print(report(found))
    if dry:
        print(f"\n{_dry(recipe, [*overrides, f'data.length={found.recipe.data.length}'], found)}")
    print(f"\nlongest sequence that fits: data.length={found.recipe.data.length}")
    return 0


def _search(recipe: str, overrides: Sequence[str], devices: Devices) -> int:
    sys.stderr.write("longtrain: planning every degree, layout and policy; where mixers are tried it takes minutes\n")
    found = search(recipe, overrides, devices)
    if not found:
        sys.stderr.write(f"longtrain: --search: {recipe} fits on {devices} with no degrees, layout and policy\n")
        return 2
    print(f"fastest of what fits on {devices}:")
    for change in found:
        print(
            f"  {change.plan.tokens_per_second:>12,.0f} tokens/s a device{change.plan.needed / GIB:>8.1f} GiB  {change}"
        )
    return 0


def _dry(recipe: str, overrides: Sequence[str], planned: Plan) -> str:
    """The dry run's account beside the plan's."""
    cut = [*overrides, "launch.processes=null"]
    held: Held = dry_run(recipe, cut, world=planned.devices.count, architecture=planned.devices.device.architecture)
    lines = [f"{'dry run':<20} {'planned':>9} {'held':>9} GiB"]
    for term in (*TERMS, "total"):
        expected = planned.memory.total if term == "total" else planned.memory.terms[term]
        lines.append(f"{term:<20} {expected / GIB:>9.3f} {held.peak[term] / GIB:>9.3f}")
    lines.append(f"on the host {held.host_peak / GIB:.1f} GiB; took {held.seconds:.0f} s")
    return "\n".join(lines)
