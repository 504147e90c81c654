"""Runs every file of `tests/kernels/interpreted`, each in a process of its own, where Triton interprets its kernels."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.distributed import TESTS, run_command

FILES = sorted(path.name for path in (TESTS / "kernels" / "interpreted").glob("test_*.py"))

Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """All the files' runs, two at a time."""
    full = request.config.getoption("--full")
    command = [sys.executable, "-P", "-m", "pytest", "-q", *(["--full"] if full else [])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    folder = TESTS / "kernels" / "interpreted"
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(
                run_command, [*command, folder / name], env=environment, cwd=TESTS.parent, timeout=3000 if full else 900
            )
            for name in FILES
        }
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FILES)
def test_kernels_interpreted(name: str, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    done = runs[name].result()
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 0, done.stdout
    with capsys.disabled():
        print(f" [{name}: {passed[0]}]", end="")
