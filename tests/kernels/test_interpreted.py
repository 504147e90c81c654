"""Runs every file of `tests/kernels/interpreted`, each in a process of its own, where Triton interprets its kernels.

That takes minutes of one core per file, so the runs begin with the test session, one after the other, beside all other
tests; these here come last.
"""

import importlib.util
import re
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.distributed import TESTS, running_command

FOLDER = TESTS / "kernels" / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
HAS_TRITON = importlib.util.find_spec("triton") is not None

_runs: list["Runs"] = []  # of this session: none or one


class Runs:
    """The runs of some files, one at a time, each limited to `timeout` seconds; closing ends what still runs."""

    def __init__(self, names: list[str], *, full: bool, timeout: float) -> None:
        self._command = [sys.executable, "-P", "-m", "pytest", "-q", *(["--full"] if full else [])]
        self._timeout, self._closed = timeout, threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._results = {name: self._pool.submit(self._run, name) for name in names}

    def result(self, name: str) -> tuple[int | None, str]:
        """A file's exit status, None if time ran out, and what it printed; waits for its end."""
        return self._results[name].result()

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, name: str) -> tuple[int | None, str]:
        with tempfile.TemporaryDirectory() as folder:
            output, end = Path(folder) / "output", time.monotonic() + self._timeout
            environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            command = [*self._command, FOLDER / name]
            with running_command(command, output=output, cwd=TESTS.parent, env=environment) as process:
                while (status := process.poll()) is None and time.monotonic() < end and not self._closed.wait(0.1):
                    pass
            return status, output.read_text(errors="replace")


def begin(session: pytest.Session) -> None:
    """Called by conftest.py before the session's first test."""
    chosen = {item.name for item in session.items}
    names = [name for name in FILES if f"{test_kernels_interpreted.__name__}[{name}]" in chosen]
    if HAS_TRITON and names:
        full = bool(session.config.getoption("--full"))
        _runs.append(Runs(names, full=full, timeout=3000 if full else 1500))


def end() -> None:
    """Called by conftest.py after the session's last test."""
    while _runs:
        _runs.pop().close()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", FILES)
def test_kernels_interpreted(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed = _runs[0].result(name)
    assert status == 0, f"exit status {status} (None: time ran out)\n{printed}"
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None and int(passed[1]) > 0, printed
    with capsys.disabled():
        print(f" [{name}: {passed[0]}]", end="")
