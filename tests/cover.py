"""Products of cases: every pair of choices in few cases for `make test`, the full product for `make test-full`.

from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)

@cover({"causal": [True, False], "window": [None, (3, 0)], "dtype": [torch.float32, torch.float64]})
def test_something(case):  # case: {"causal": True, "window": None, "dtype": torch.float32}, for one
    ...
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

_SAMPLE = 4000
Case = dict[str, Any]
Axes = Mapping[str, Sequence[Any]]
Test = Callable[..., None]


def _always(case: Case) -> bool:
    return True


def cover(axes: Axes, possible: Callable[[Case], bool] = _always) -> Callable[[Test], Test]:
    """Give a test its argument `case` from the pairwise cover, under --full from the whole product.

    axes: the choices by name. possible: tells which combinations exist.
    """

    def decorate(test: Test) -> Test:
        vars(test)["cover"] = (axes, possible)
        return test

    return decorate


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if found := vars(metafunc.function).get("cover"):
        cases = (product if metafunc.config.getoption("--full") else pairwise)(*found)
        metafunc.parametrize("case", cases, ids=_name)


def product(axes: Axes, possible: Callable[[Case], bool] = _always) -> list[Case]:
    """All possible combinations of one choice per axis."""
    cases = (dict(zip(axes, choices, strict=True)) for choices in itertools.product(*axes.values()))
    return [case for case in cases if possible(case)]


def pairwise(axes: Axes, possible: Callable[[Case], bool] = _always) -> list[Case]:
    """Few cases in which every two choices of different axes meet, wherever a possible case holds both (greedy)."""
    candidates = product(axes, possible)
    # Of very many, some: so large a sample holds every pair that is not rare.
    candidates = random.Random(0).sample(candidates, min(len(candidates), _SAMPLE))
    cases = [tuple((axis, axes[axis].index(choice)) for axis, choice in case.items()) for case in candidates]
    pairs = [frozenset(itertools.combinations(case, 2)) for case in cases]
    missing = frozenset[Any]().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda n: len(pairs[n] & missing))
        missing -= pairs[best]
        chosen.append({axis: axes[axis][index] for axis, index in cases[best]})
    return chosen


def _name(case: Case) -> str:
    return "-".join(f"{axis}={choice}".replace(" ", "") for axis, choice in case.items())
