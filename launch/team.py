"""Worker processes of a benchmark: each takes commands from a pipe and sleeps in between."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, cast

from longtrain.launch.local import KEEP_MEMORY

LOG_CHARACTERS = 3000  # of a worker that died


class Team:
    """Workers that form one process group. Used as a context: leaving it ends them.

    with Team("longtrain.bench_attention", 2, threads=1, device="cpu") as team:
        answers = team.ask("measure", {"side": "zigzag"})  # one per rank
    """

    def __init__(self, module: str, processes: int, *, threads: int, device: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="longtrain-team-")
        self._workers: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        try:
            for rank in range(processes):
                # A file as the meeting point: no port to race for.
                store = Path(self._folder.name) / "store"
                words = ["--rank", rank, "--world", processes, "--store", store, "--threads", threads]
                self._start([sys.executable, "-m", module, *map(str, words), "--device", device], rank, threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def ask(self, do: str, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Have every rank do something; the answers in the order of the ranks.

        Raises:
            RuntimeError: a rank failed or died; with its traceback, or the end of its log.
        """
        command = json.dumps({"do": do, **(options or {})}).encode()
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(command)
            except OSError:
                raise RuntimeError(self._death(rank)) from None
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._pipes):
            silent = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for pipe in wait(list(silent)):
                rank = silent[cast(Connection, pipe)]
                try:
                    answers[rank] = json.loads(cast(Connection, pipe).recv_bytes())
                except (EOFError, OSError):
                    raise RuntimeError(self._death(rank)) from None
                if "failed" in answers[rank]:
                    raise RuntimeError(f"rank {rank} of the benchmark failed in {do}:\n{answers[rank]['failed']}")
        return [answers[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.wait()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _start(self, command: list[str], rank: int, threads: int) -> None:
        ours, theirs = Pipe()
        environment = {
            "GLOO_SOCKET_IFNAME": "lo",  # every rank is here, whatever the host's name resolves to
            **os.environ,
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": str(threads),
            **KEEP_MEMORY,
        }
        with self._log(rank).open("wb") as log:
            worker = subprocess.Popen(
                [*command, "--pipe", str(theirs.fileno())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        theirs.close()  # or this process would not see the worker's end
        self._workers.append(worker)
        self._pipes.append(cast(Connection, ours))

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}.log"

    def _death(self, rank: int) -> str:
        log = self._log(rank).read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
        return f"rank {rank} of the benchmark died with exit code {self._workers[rank].wait()}; its log ends:\n{log}"
