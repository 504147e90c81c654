"""Which tests run: `--full` adds those marked `full`, a GPU those marked `gpu`; what is skipped says why."""

import argparse
import sys
from types import ModuleType

import hypothesis
import pytest

# No deadline per example: times on shared machines vary. Derandomized: a red run can be repeated.
hypothesis.settings.register_profile("longtrain", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("longtrain")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too (make test-full)")
    parser.addoption("--part", type=_part, metavar="K/N", help="run the K-th of N parts, every N-th test, K from 1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        _skip(items, "full", "takes long: make test-full runs it")
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a GPU")
    if (part := config.getoption("--part")) is not None:
        number, parts = part
        config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % parts != number - 1])
        items[:] = items[number - 1 :: parts]
    # What runs beside the other tests is asked for at the end, so that nobody waits for it. (The sort is stable.)
    items.sort(key=lambda item: isinstance(item, pytest.Function) and hasattr(item.module, "begin"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside worker processes; more threads than cores would only slow both. Imports no torch by itself."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Let modules with a `begin` start what runs long in processes of its own, beside all other tests."""
    if not session.config.option.collectonly:
        for module in _modules(session):
            if hasattr(module, "begin"):
                module.begin(session)


def pytest_sessionfinish(session: pytest.Session) -> None:
    for module in _modules(session):
        if hasattr(module, "end"):
            module.end()
    # The processes that tests share end with the session. None were started if nobody imported the helper.
    helper = sys.modules.get("tests.distributed")
    if helper is not None:
        helper.close_pools()


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected K/N with 1 <= K <= N, such as 3/20")
    return int(number), int(parts)


def _modules(session: pytest.Session) -> list[ModuleType]:
    """The modules of the tests to run, in their order."""
    found = (item.module for item in session.items if isinstance(item, pytest.Function))
    return [module for module in dict.fromkeys(found) if module is not None]


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(mark) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
