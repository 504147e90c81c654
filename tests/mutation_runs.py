"""How `tests/mutations.py` tests a mutation: in a copy of the repository, by processes that share one import of torch.

A pytest process and its ranks spend ten times as long on importing torch as on the few tests that a mutation needs. So
the first process imports torch and nothing of longtrain. Each test run is forked from it and imports the copy's
longtrain, mutated; each rank is forked from the test run.
"""

import contextlib
import importlib
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hypothesis  # noqa: F401  to be there after the fork
import pytest
import torch
import torch._dynamo.testing
import torch.distributed.device_mesh
import torch.utils.checkpoint

with contextlib.suppress(ImportError):
    import triton  # noqa: F401

from tests.mutated.mutation import ROOT, Mutation, misfit

_NOBODY_ANSWERED = 99


class Outcome(NamedTuple):
    """What became of a mutation."""

    verdict: str  # "red", "SURVIVED" or "BROKEN"
    seconds: float
    told: str  # the first failure in a line, or why nothing could be said


class Workshop:
    """A copy of the repository, below `folder`, in which mutations are made and tested."""

    def __init__(self, folder: Path) -> None:
        assert "longtrain" not in sys.modules, "the copy's longtrain could not be imported in this process"
        self.root, self._imports, self._output = folder / "copy", folder / "imports", folder / "output"
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
            if name and os.path.lexists(ROOT / name):  # (a tracked file may have been deleted)
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.root / name, follow_symlinks=False)
        # Only the package comes into the path: a bare `kernels` or `launch` must not be found there.
        self._imports.mkdir()
        (self._imports / "longtrain").symlink_to(self.root / "longtrain")
        self._edits = 0

    def judge(self, mutation: Mutation, limit: float) -> Outcome:
        """Make a mutation, test it, take it back."""
        if problem := misfit(mutation, self.root):
            return Outcome("BROKEN", 0.0, problem)
        path = self.root / mutation.file
        text, before = path.read_text(encoding="utf-8"), path.stat()
        try:
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            # Byte code is known by size and whole seconds: a quick mutation could run as the file before it.
            self._edits += 1
            os.utime(path, (before.st_atime, before.st_mtime + self._edits))
            return self.test(mutation.tests, limit)
        finally:
            path.write_text(text, encoding="utf-8")
            os.utime(path, (before.st_atime, before.st_mtime))

    def test(self, tests: Iterable[str], limit: float) -> Outcome:
        """Run tests to the first failure."""
        begin = time.monotonic()
        code = self._run(tests, limit)
        seconds, printed = time.monotonic() - begin, self._output.read_text(errors="replace")
        if code is None:  # ranks wait for each other: in a plain run the tests' own limits end that
            return Outcome("red", seconds, f"did not end in {limit:.0f} s")
        if code == pytest.ExitCode.OK:
            return Outcome("SURVIVED", seconds, "")
        if code != pytest.ExitCode.TESTS_FAILED:  # what cannot be imported proves nothing about the tests
            return Outcome("BROKEN", seconds, f"pytest ended with {code}:\n{printed[-3000:]}")
        lines = [line[1:].strip() for line in printed.splitlines() if line.startswith("E ")]
        said = [line for line in lines if line and "reproduce" not in line]  # (hypothesis tells how to)
        # Of a rank that failed its own error; the lines before it are those of the test.
        errors = [line for line in said if "Error: " in line and "Traceback" not in line] or said[::-1]
        return Outcome("red", seconds, errors[0] if errors else printed[-3000:])

    def _run(self, tests: Iterable[str], limit: float) -> int | None:
        """pytest's exit code; None where it did not end in time. Afterwards none of its processes is left."""
        reader, writer = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            self._become_pytest(list(tests), writer)
        os.close(writer)
        ended, _, _ = select.select([reader], [], [], limit)
        code = os.read(reader, 1) if ended else b""
        os.close(reader)
        _end_group(child)
        if not ended:
            return None
        return code[0] if code else _NOBODY_ANSWERED

    def _become_pytest(self, tests: list[str], writer: int) -> NoReturn:
        code = _NOBODY_ANSWERED
        try:
            os.setpgid(0, 0)
            sink = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            os.chdir(self.root)
            sys.path.insert(0, str(self._imports))
            os.environ["PYTHONPATH"] = str(self._imports)  # of the processes that tests start
            for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
                del sys.modules[name]  # the copy's are meant
            importlib.invalidate_caches()
            options = ["-x", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(self.root)]
            code = int(pytest.main([*options, *tests], plugins=[_InTheCopy(self.root)]))
        finally:
            sys.stdout.flush()
            os.write(writer, bytes([code]))
            os._exit(0)


class _InTheCopy:
    """A plugin: refuses any longtrain but the copy's, and lets ranks be forked."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for name in ("longtrain", "longtrain.parallel", "longtrain.kernels"):
            found = Path(importlib.import_module(name).__file__ or "").resolve()
            if not found.is_relative_to(self._root):
                raise pytest.UsageError(f"{name} was imported from {found}, not from the copy in {self._root}")
        helper: Any = sys.modules.get("tests.distributed")
        if helper is not None:
            helper._Pool._start = _fork_rank


def _fork_rank(pool: Any, rank: int) -> None:
    """In place of `_Pool._start` in tests/distributed.py."""
    helper: Any = sys.modules["tests.distributed"]
    assert pool.places is None, "ranks in other networks cannot be forked"
    ours, theirs = Pipe()
    torch.set_num_threads(1)  # no threads, which would not come along
    parent, child = os.getpid(), os.fork()
    if child == 0:
        try:
            ours.close()
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            log = os.open(pool.folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            helper._work(rank, pool.world, theirs, pool.meeting, parent)
        finally:
            os._exit(1)
    theirs.close()
    pool.workers.append(_Forked(child))
    pool.pipes.append(ours)


class _Forked:
    """As much of `subprocess.Popen` as a pool uses."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._code: int | None = None

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        if self._code is None:
            os.kill(self._pid, number)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._code


def _end_group(child: int) -> None:
    """Kill a test run and its ranks."""
    for kill in (os.killpg, os.kill):  # (it may not have come to making its group)
        try:
            kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    os.waitpid(child, 0)
