"""Starts the ranks of a run on this machine, watches them, and shows the failure that came first.

Rank 0 has the terminal; what the others print is kept in `<logs>/rank-N.log`. When one rank ends with an error of
whatever kind, the others are stopped and the user sees that rank's own words, not the "connection reset" of its
neighbours. No rank outlives this process.
"""

import ctypes
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from longtrain.errors import FAILURE_FOLDER, Failure, UsageError, read_failure

if TYPE_CHECKING:  # the config brings torch along, which only some launches need this early
    from longtrain.recipe import Recipe

POLL = 0.05  # seconds between two looks at the ranks
SETTLE = 0.5  # seconds in which other ranks' failures are gathered after one is seen, to tell which came first
GRACE = 5.0  # seconds that a rank has to end after SIGTERM, before SIGKILL
LOG_LINES = 20  # of a rank that ended without a report
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# glibc hands large blocks back to the system when they are freed and gets them again, page by page and zeroed, at the
# next step; a training loop does better to keep them: about 5 % of a step of the quickstart's size, and a tenth of
# linear attention over 65,536 tokens, whose blocks of 64 MiB no threshold keeps (32 MiB is the highest that there is).
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def processes_for(recipe: "Recipe") -> int:
    """How many ranks this machine runs: one per GPU; on CPU what the recipe says, or its degrees' product.

    Raises:
        UsageError: the recipe asks for GPUs and there are none.
    """
    gpus = 0
    if recipe.launch.device != "cpu":
        import torch

        gpus = torch.cuda.device_count()
    if recipe.launch.device == "cuda" and not gpus:
        raise UsageError("launch.device: got 'cuda', but PyTorch finds no GPU here; launch.device=cpu would work")
    return gpus or recipe.launch.processes or (recipe.parallel.data or 1) * (recipe.parallel.sequence or 1)


def cores() -> int:
    """CPU cores that this process may use: fewer than the machine has, in a container or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train_command(arguments: Sequence[str], *, module: str = "longtrain.train") -> list[str]:
    """The command line of one training rank."""
    return [sys.executable, "-m", module, *arguments]


def run_ranks(
    command: Sequence[str],
    *,
    processes: int,
    logs: Path,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Run `command` as ranks 0 ... processes - 1 that can reach each other through `init_process_group()`.

    Must be called from the main thread: while the ranks run, SIGINT, SIGTERM and SIGHUP stop them first.

    Args:
        command: program and arguments, the same for all ranks; they differ in RANK and LOCAL_RANK.
        logs: folder `logs` of the run folder, for what ranks 1 and up print. It is written when the ranks have ended,
            and only if the run folder is there by then: a run that was refused leaves nothing behind.
        environment: what the ranks' environment is made from (default: this process's).

    Returns:
        0 when every rank ended well; 2 when what came first was a `UsageError`; 128 + n when this process received
        signal n; otherwise 1.
    """
    ranks: list[_Rank] = []
    with tempfile.TemporaryDirectory(prefix="longtrain-") as folder, _SignalsNoted() as signals:
        reports = Path(folder)
        # Bound here, before any rank starts, so that no other program can take the port; loopback only.
        with socket.create_server(("127.0.0.1", 0), backlog=max(64, processes)) as listener:
            port = listener.getsockname()[1]
            try:
                for rank in range(processes):
                    variables = _rank_environment(environment, rank=rank, processes=processes, port=port)
                    variables[FAILURE_FOLDER] = folder
                    ranks.append(_start(command, rank, variables, None if rank == 0 else reports / f"rank-{rank}.log"))
                store = _host_store(listener, processes)
                ended = _watch(ranks, reports, signals)
            finally:
                _stop(ranks, signals)
                if not _refused(ranks, reports):
                    _keep_logs(ranks, logs)
        del store
        if not signals.received and ended:
            return 0
        _show_cursor()
        if signals.received:
            name = signal.Signals(signals.received[0]).name
            print(f"longtrain: stopped by {name}", file=sys.stderr)
            return 128 + signals.received[0]
        return _explain(ranks, reports)


@dataclass
class _Rank:
    """One started rank."""

    number: int
    process: subprocess.Popen[bytes]
    log: Path | None  # None: the terminal
    kept: Path | None = None  # where the log was kept
    failed_at: float | None = None  # seconds since the epoch, when this process noticed it
    code: int | None = None  # exit code (-n: signal n), noted before the ranks are stopped


@dataclass
class _SignalsNoted:
    """While entered, the signals that would end this process are noted in `received` instead."""

    received: list[int] = field(default_factory=list)
    _previous: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> "_SignalsNoted":
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("ranks are started from the main thread, which alone can handle signals")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def for_ranks(
    environment: Mapping[str, str], *, processes: int, alone: bool, given: Mapping[str, str]
) -> dict[str, str]:
    """`environment` and what ranks want in theirs, except what is `given`: a user's own settings stay.

    processes: the ranks of this machine. alone: of this machine only.
    """
    # Threads are shared out evenly; more threads than cores make them wait for one another.
    wanted = {"OMP_NUM_THREADS": str(max(1, cores() // processes))} | KEEP_MEMORY
    if alone and sys.platform == "linux":
        wanted["GLOO_SOCKET_IFNAME"] = "lo"  # every rank is here, whatever the host's name resolves to
    # What DeepSpeed compiles fits one environment's PyTorch and Python; its own default is one folder for all of them.
    environments = Path("~/.cache/longtrain/torch_extensions").expanduser()
    wanted["TORCH_EXTENSIONS_DIR"] = str(environments / hashlib.sha256(sys.prefix.encode()).hexdigest()[:12])
    return {
        **environment,
        **{name: value for name, value in wanted.items() if name not in given},
        "PYTHONSAFEPATH": "1",  # a folder named `kernels` in the working directory must not be imported
        "PYTHONUNBUFFERED": "1",  # a killed rank's last words reach its log
        "PYTHONFAULTHANDLER": "1",  # a segmentation fault leaves a traceback
    }


def _rank_environment(environment: Mapping[str, str] | None, *, rank: int, processes: int, port: int) -> dict[str, str]:
    variables = dict(os.environ if environment is None else environment)
    return for_ranks(variables, processes=processes, alone=True, given=variables) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # This process serves the store, as torchrun's agent does: ranks are all clients of it.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _start(command: Sequence[str], rank: int, variables: Mapping[str, str], log: Path | None) -> _Rank:
    output = None if log is None else log.open("ab")
    try:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops the ranks in order
            preexec_fn=_die_with_parent(),
        )
    finally:
        if output is not None:
            output.close()
    return _Rank(rank, process, log)


def _die_with_parent() -> Callable[[], None] | None:
    """What a new process does first, so that it ends with this one even when this one is killed (Linux only)."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return arm


def _host_store(listener: socket.socket, processes: int) -> Any:
    """Serve the store that the ranks meet at; ranks that connect earlier wait in the socket's queue."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  (public, in torch's documentation)

    port = listener.getsockname()[1]
    file_descriptor = listener.detach()  # the store owns it from here
    return TCPStore(
        "127.0.0.1", port, processes, is_master=True, wait_for_workers=False, master_listen_fd=file_descriptor
    )


def _watch(ranks: Sequence[_Rank], reports: Path, signals: _SignalsNoted) -> bool:
    """Wait until all ranks end well (True), or one fails or a signal arrives (False)."""
    deadline = None
    while not signals.received:
        for rank in ranks:
            rank.code = rank.process.poll()
            # A rank that reported but hangs on its way out has failed too.
            if rank.failed_at is None and (rank.code or read_failure(reports, rank.number)):
                rank.failed_at = time.time()
                deadline = deadline or time.monotonic() + SETTLE
        if all(rank.code is not None for rank in ranks) or (deadline and time.monotonic() >= deadline):
            return deadline is None
        time.sleep(POLL)
    return False


def _stop(ranks: Sequence[_Rank], signals: _SignalsNoted) -> None:
    """End all ranks and what they started: SIGTERM, then SIGKILL after a while or at once on a second signal."""
    for rank in ranks:
        if rank.process.poll() is None:
            _signal_group(rank, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(rank.process.poll() is None for rank in ranks):
        if time.monotonic() >= deadline or len(signals.received) > 1:
            break
        time.sleep(POLL)
    for rank in ranks:
        _signal_group(rank, signal.SIGKILL)
        rank.process.wait()


def _signal_group(rank: _Rank, number: signal.Signals) -> None:
    try:
        os.killpg(rank.process.pid, number)
    except ProcessLookupError:  # the rank and everything it started have ended
        pass


def _refused(ranks: Sequence[_Rank], reports: Path) -> bool:
    """Whether the ranks refused what the user gave: then nothing is written, least of all into a folder that exists."""
    failures = (read_failure(reports, rank.number) for rank in ranks)
    return any(failure is not None and failure.exit_code == 2 for failure in failures)


def _keep_logs(ranks: Sequence[_Rank], logs: Path) -> None:
    for rank in ranks:
        if rank.log is not None and rank.log.stat().st_size and logs.parent.is_dir():
            logs.mkdir(exist_ok=True)
            rank.kept = logs / rank.log.name
            with rank.log.open("rb") as source, rank.kept.open("ab") as sink:  # a resumed run's logs go on
                shutil.copyfileobj(source, sink)


def _explain(ranks: Sequence[_Rank], reports: Path) -> int:
    """Print the failure that came first; returns the exit code."""
    failures = [(rank, read_failure(reports, rank.number)) for rank in ranks if rank.failed_at is not None]
    rank, report = min(failures, key=_order)
    if report is not None and report.exit_code == 2:
        sys.stderr.write(report.text)
        return 2
    stopped = "; the other ranks were stopped" if len(ranks) > 1 else ""
    how = "failed" if report is not None else _ending(rank.code)
    lines = [f"longtrain: rank {rank.number} (pid {rank.process.pid}) {how}{stopped}"]
    if report is not None:
        lines += report.text.splitlines()
        if rank.kept is not None:
            lines.append(f"the log of rank {rank.number}: {rank.kept}")
    elif rank.log is not None and (printed := rank.log.read_text(encoding="utf-8", errors="replace").splitlines()):
        lines += [f"the end of its log{'' if rank.kept is None else f', {rank.kept}'}:", *printed[-LOG_LINES:]]
    print("\n".join(lines), file=sys.stderr)
    return 1


def _order(failure: tuple[_Rank, Failure | None]) -> tuple[bool, float]:
    """Sorts the cause before its consequences.

    A rank that loses a neighbour raises, and reports, within milliseconds: often before this process notices that the
    neighbour was killed or left without a word. So those come first. Not so SIGABRT, with which communication
    libraries end a process whose neighbour is gone.
    """
    rank, report = failure
    assert rank.failed_at is not None
    silent = report is None and rank.code != -signal.SIGABRT
    return not silent, rank.failed_at if report is None else report.time


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system does this when memory runs out)" if -code == signal.SIGKILL else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {code}"


def _show_cursor() -> None:
    """A rank that was stopped inside its progress bar leaves the terminal's cursor hidden."""
    if sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h\n")
        sys.stdout.flush()
