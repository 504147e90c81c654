"""The process of a dry run: prints one line of JSON."""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence

from longtrain.config import compose
from longtrain.dry_run.step import run
from longtrain.errors import leave, report_failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step of a recipe; 0, or 2 for what the user can mend, or 1."""
    parser = argparse.ArgumentParser(prog="python -m longtrain.dry_run", description="A recipe's step without devices.")
    parser.add_argument("--config-name", required=True, metavar="RECIPE", help="name of a recipe, or a .yaml file")
    parser.add_argument("--world", type=int, required=True, metavar="N", help="devices")
    parser.add_argument("--rank", type=int, default=0, metavar="R", help="which of them (default 0)")
    parser.add_argument("--architecture", metavar="NAME", help="sm_90, say; default: CPUs")
    parser.add_argument("--real", action="store_true", help="really, on this CPU, in a world of one")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_intermixed_args(argv)
    try:
        recipe = compose(given.config_name, given.overrides)
        held = run(recipe, world=given.world, rank=given.rank, architecture=given.architecture, real=given.real)
        print(json.dumps(dataclasses.asdict(held)))
    except Exception as error:
        return report_failure(error, environment=os.environ)
    return 0


if __name__ == "__main__":
    leave(main())
