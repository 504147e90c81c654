"""Test helpers that start processes: functions on W ranks of a gloo group, and commands with a hard time limit.

    def add(rank, world, number):              # a function of the test module; every rank calls it
        ...
        return something_that_pickles

    def test_add():
        results = run_distributed(3, add, 7)   # one result per rank

The worker processes of a world size are kept between calls, because importing torch costs seconds. In a worker the
default process group is a gloo group of all ranks, and torch runs one thread. If a rank raises, dies or does not answer
in time, the call fails with that rank's traceback, and the next call starts new workers.

Run as a script, this file is a worker.
"""

import contextlib
import faulthandler
import importlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

START_TIMEOUT = 120.0  # seconds for all workers of a pool to import torch and meet, on a busy machine
GRACE = 2.0  # seconds that the other ranks get to report, once one rank has failed
TESTS = Path(__file__).resolve().parent

_pools: dict[int, "_Pool"] = {}


class Place(NamedTuple):
    """Where a rank runs: put before its command (to enter another network, say), and the interface that it talks on."""

    command: tuple[str, ...]
    interface: str


class RankFailed(AssertionError):
    """A rank raised, died, or did not answer in time; the message holds its traceback."""


def run_distributed(world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call `function(rank, world, *args)` in `world` processes that form a gloo group; their results in rank order.

    function: a module-level function; it, `args` and the results are pickled. timeout: seconds for the call, without
    the start of the workers. A `RankFailed` says which ranks failed or hung, and where.
    """
    pool = _pools.get(world)
    if pool is None:
        pool = _pools[world] = _Pool(world)
    try:
        return pool.call(function, args, timeout)
    except BaseException:  # an interrupted call too leaves ranks that wait for each other
        _pools.pop(world).close()
        raise


def run_in_places(
    places: Sequence[Place], meeting: str, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Any]:
    """As `run_distributed`, with one rank in each place; these workers end with the call.

    meeting: torch.distributed's `init_method`, such as "tcp://10.0.0.1:29500", where rank 0 listens.
    """
    pool = _Pool(len(places), places, meeting)
    try:
        return pool.call(function, args, timeout)
    finally:
        pool.close()


def close_pools() -> None:
    """End all workers; called once at the end of the test session."""
    while _pools:
        _pools.popitem()[1].close()


@contextlib.contextmanager
def running_command(
    command: Sequence[str | Path],
    *,
    output: Path,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a process group of its own; leaving the block kills the whole group.

    output: the file that gets its stdout and stderr. env: added to this process's environment.
    """
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [os.fspath(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _kill_group(process)


def run_command(
    command: Sequence[str | Path],
    *,
    timeout: float,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; returncode and output (stdout and stderr together, in `stdout`).

    After `timeout` seconds the command and its children are killed, and an AssertionError shows what it had printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        with running_command(command, output=output, cwd=cwd, env=env) as process:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                _kill_group(process)
                said = output.read_text(errors="replace")
                raise AssertionError(f"{command} did not end in {timeout} s; it printed:\n{said}") from None
        return subprocess.CompletedProcess(list(command), code, output.read_text(errors="replace"), "")


class _Pool:
    """The worker processes of one world size, and a pipe to each."""

    def __init__(self, world: int, places: Sequence[Place] | None = None, meeting: str | None = None) -> None:
        self.world = world
        self.folder = Path(tempfile.mkdtemp(prefix="longtrain-ranks-"))
        self.places = places
        # A file as the meeting point where ranks share this machine's network: no port to race for.
        self.meeting = meeting or f"file://{self.folder / 'store'}"
        self.workers: list[subprocess.Popen[bytes]] = []
        self.pipes: list[Connection] = []
        try:
            for rank in range(world):
                self._start(rank)
            self._collect("start", START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        # In two layers: what a worker may import must be set before it unpickles the function. Plain pickle, not the
        # pipe's own, which would send tensors as file descriptors that die with the worker.
        task = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for rank, pipe in enumerate(self.pipes):
            try:
                pipe.send_bytes(task)
            except OSError:
                raise RankFailed(f"rank {rank} of {self.world} died between two calls\n{self._log(rank)}") from None
        return self._collect(getattr(function, "__qualname__", str(function)), timeout)

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
        for pipe in self.pipes:
            pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, rank: int) -> None:
        ours, theirs = Pipe()
        # -P: the folder of this script stays off sys.path, where tests/kernels would be found as a bare `kernels`.
        command = [sys.executable, "-P", __file__, str(rank), str(self.world), str(theirs.fileno()), self.meeting]
        command.append(str(os.getpid()))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may lead nowhere
        if self.places is not None:
            command[:0] = self.places[rank].command
            environment["GLOO_SOCKET_IFNAME"] = self.places[rank].interface
        with (self.folder / f"rank{rank}.log").open("wb") as log:
            worker = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()
        self.workers.append(worker)
        self.pipes.append(cast(Connection, ours))

    def _collect(self, what: str, timeout: float) -> list[Any]:
        """Every rank's answer; as soon as one has failed, or at the time limit, a RankFailed that tells about all."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world and (left := deadline - time.monotonic()) > 0:
            silent = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results | failures}
            for pipe in wait(list(silent), left):
                assert isinstance(pipe, Connection)
                rank = silent[pipe]
                try:
                    succeeded, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    failures[rank] = f"died with exit code {self.workers[rank].wait()}\n{self._log(rank)}"
                else:
                    (results if succeeded else failures)[rank] = answer
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE)
        if len(results) == self.world:
            return [results[rank] for rank in range(self.world)]
        waiting = [rank for rank in range(self.world) if rank not in results | failures]
        report = [f"rank {rank} of {self.world} failed in {what}: {text}" for rank, text in sorted(failures.items())]
        if failures and waiting:
            report.append(f"ranks {waiting} were still at work")
        elif waiting:
            report.append(f"{what}: ranks {waiting} of {self.world} did not answer in {timeout} s")
            report += [f"rank {rank} stood here:\n{self._stack(rank)}" for rank in waiting]
        raise RankFailed("\n".join(report))

    def _log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")[-5000:]

    def _stack(self, rank: int) -> str:
        """Where a hanging rank stands, written by its fault handler into its log."""
        before = len(self._log(rank))
        self.workers[rank].send_signal(signal.SIGUSR1)
        for _ in range(20):
            time.sleep(0.1)
            if len(self._log(rank)) > before:
                time.sleep(0.1)  # the rest of the trace
                break
        return self._log(rank)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _work(rank: int, world: int, pipe: Connection, meeting: str, parent: int) -> None:
    """A worker's life: meet the others, then answer calls until the parent closes the pipe.

    parent: the number of the process that started it: one that ended before now could not be asked for any more.
    """

    def watch_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # also out of a collective that waits for ever

    threading.Thread(target=watch_parent, daemon=True).start()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    _make_tests_importable()
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    pipe.send_bytes(pickle.dumps((True, None)))
    with contextlib.suppress(EOFError):
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes(), rank, world))


def _answer(task: bytes, rank: int, world: int) -> bytes:
    try:
        sys.path[:], call = pickle.loads(task)
        function, args = pickle.loads(call)
        _take_back_linear()
        return pickle.dumps((True, function(rank, world, *args)))
    except BaseException:  # whatever it is, the test shall show it
        return pickle.dumps((False, traceback.format_exc()))


def _take_back_linear() -> None:
    """DeepSpeed's ZeRO-3 leaves a linear function of its own behind, which later tests in this worker would call."""
    import torch

    torch.nn.functional.linear = torch._C._nn.linear  # pyright: ignore[reportAttributeAccessIssue]


def _make_tests_importable() -> None:
    """Make the test modules importable as pytest names them (`tests.parallel.test_shard`), with sys.path untouched."""
    package = ModuleType("tests")
    package.__path__ = [str(TESTS)]
    sys.modules["tests"] = package
    importlib.invalidate_caches()


if __name__ == "__main__":
    _work(int(sys.argv[1]), int(sys.argv[2]), Connection(int(sys.argv[3])), sys.argv[4], int(sys.argv[5]))
