"""The list of mutations fits the code; `python tests/mutations.py` makes them all, and `make test-full` a few."""

import ast
import sys

import pytest

from tests.distributed import run_command
from tests.mutated.mutation import ROOT, misfit
from tests.mutations import MUTATIONS

FEW = ("round-skipped", "shares-in-flight-rounded", "nan-containment-dropped", "ragged-tail-of-a-triton-chunk")


def test_every_mutation_can_be_made() -> None:
    assert not [problem for mutation in MUTATIONS if (problem := misfit(mutation))]


def test_every_mutation_leaves_python() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / mutation.file).read_text(encoding="utf-8")
        ast.parse(text.replace(mutation.old, mutation.new), mutation.name)


def test_names_are_unique_and_tests_exist() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, function = test.partition("[")[0].partition("::")
            assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), (mutation.name, test)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_few_mutations_are_found() -> None:
    done = run_command([sys.executable, "-P", ROOT / "tests" / "mutations.py", *FEW], timeout=500)
    assert done.returncode == 0, done.stdout
    assert f"{len(FEW)} of {len(FEW)} mutations were found" in done.stdout
