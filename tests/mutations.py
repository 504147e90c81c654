"""Mutations: one error for each mechanism of the kernels and of what ranks do, and the tests that must turn red for it.

    python tests/mutations.py               # all of them, a few minutes
    python tests/mutations.py NAME ...      # some
    python tests/mutations.py --list

The repository's files are copied to a temporary folder, and there one mutation after the other is made, tested and
taken back. Exit code 1: a mutation survived, that is, its tests stayed green (so a test is missing); or its old text
is no longer there exactly once; or its tests could not run at all. The lists are in `tests/mutated`;
`tests/test_mutations.py` checks that they fit the code.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # As the workers of tests/distributed.py do it: test modules are found by pytest's names, and the folder of this
    # script, where tests/kernels would be found as a bare `kernels`, is no place to look.
    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != folder]
    package = ModuleType("tests")
    package.__path__ = [str(folder)]
    sys.modules |= {"tests": package, "tests.mutations": sys.modules["__main__"]}

from tests.mutated import (
    architectures,
    attention,
    engines,
    launchers,
    linear_mixers,
    linearisation,
    memory,
    planning,
    softmax_kernels,
    torch_kernels,
    triton_kernels,
)
from tests.mutated.mutation import Mutation

if TYPE_CHECKING:
    from tests.mutation_runs import Outcome

LIMIT = 180.0  # seconds for a mutation's tests; some mutations make ranks wait for each other
MUTATIONS = (
    architectures.MUTATIONS
    + attention.MUTATIONS
    + torch_kernels.MUTATIONS
    + triton_kernels.MUTATIONS
    + softmax_kernels.MUTATIONS
    + linear_mixers.MUTATIONS
    + linearisation.MUTATIONS
    + engines.MUTATIONS
    + memory.MUTATIONS
    + launchers.MUTATIONS
    + planning.MUTATIONS
)


def run(mutations: Iterable[Mutation], *, limit: float = LIMIT) -> "dict[str, Outcome]":
    """What became of each mutation; nothing is tried where the tests are red without any. Prints as it goes.

    For a process that has not imported longtrain.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; only tests that ask for its kernels use it
    from tests.mutation_runs import Workshop

    mutations = list(mutations)
    with tempfile.TemporaryDirectory(prefix="longtrain-mutations-") as folder:
        workshop = Workshop(Path(folder))
        tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
        unmutated = workshop.test(tests, limit=limit + 10 * len(tests))
        if unmutated.verdict != "SURVIVED":
            raise SystemExit(f"the tests must be green without a mutation, but: {unmutated.told}")
        print(f"{'(none)':40} green {unmutated.seconds:7.1f} s", flush=True)
        outcomes = {}
        for mutation in mutations:
            outcome = outcomes[mutation.name] = workshop.judge(mutation, limit)
            print(f"{mutation.name:40} {outcome.verdict:8} {outcome.seconds:4.1f} s  {outcome.told[:150]}", flush=True)
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations to make; all where none is named")
    parser.add_argument("--list", action="store_true", help="name them and end")
    options = parser.parse_args()
    known = {mutation.name: mutation for mutation in MUTATIONS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no such mutations: {', '.join(unknown)}; --list names them")
    if options.list:
        print("\n".join(f"{mutation.name:40} {mutation.file}" for mutation in MUTATIONS))
        return 0
    outcomes = run(known[name] for name in options.names or known)
    bad = [name for name, outcome in outcomes.items() if outcome.verdict != "red"]
    total = sum(outcome.seconds for outcome in outcomes.values())
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} mutations were found in {total:.0f} s")
    for name in bad:
        print(f"{name}: {outcomes[name].verdict} {outcomes[name].told}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
