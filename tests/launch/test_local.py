"""What a user sees when a rank fails, and that no rank is ever left behind."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from longtrain.errors import UsageError
from longtrain.launch.local import cores, processes_for, run_ranks

# What longtrain.train does around a run, without the run.
ENTRY = """
import os, signal, sys, time
from pathlib import Path
from longtrain.errors import UsageError, report_failure

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = Path(__file__).parent

def wait_for(path):
    while not path.exists():
        time.sleep(0.01)

def reported(rank):
    return Path(os.environ["LONGTRAIN_FAILURE_FOLDER"]) / f"rank-{rank}.json"

def neighbour_fails():
    # What a rank meets when its neighbour goes: an error of its own.
    wait_for(folder / "gone")
    raise RuntimeError("connection reset by peer")

def run():
{body}

try:
    run()
except BaseException as error:
    sys.exit(report_failure(error, environment=os.environ))
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a script's body as some ranks; returns the launcher's exit code."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def run(body: str, processes: int = 2) -> int:
        script = write_script(tmp_path, body)
        return run_ranks([sys.executable, str(script)], processes=processes, logs=tmp_path / "logs")

    return run


def write_script(folder: Path, body: str) -> Path:
    script = folder / "script.py"
    script.write_text(ENTRY.replace("{body}", textwrap.indent(textwrap.dedent(body), "    ")))
    return script


def alive(pid: int) -> bool:
    """Whether a process runs: an ended one whose parent has not asked for it yet (a zombie) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_ranks_meet_and_share_the_threads(ranks, tmp_path: Path, capfd):
    code = ranks(
        """
        import torch
        import torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor([float(rank + 1)])
        dist.all_reduce(total)
        print(f"rank {rank} of {world}: sum {total.item()}, threads {os.environ['OMP_NUM_THREADS']}")
        dist.destroy_process_group()
        """
    )
    shown = capfd.readouterr()
    threads = max(1, cores() // 2)
    assert code == 0
    assert shown.out == f"rank 0 of 2: sum 3.0, threads {threads}\n"  # rank 0 alone is on the screen
    assert f"rank 1 of 2: sum 3.0, threads {threads}\n" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_the_users_own_number_of_threads_stays(ranks, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert ranks("print(os.environ['OMP_NUM_THREADS'])", processes=1) == 0
    assert capfd.readouterr().out == "7\n"


def test_shows_the_first_failing_ranks_traceback_once(ranks, tmp_path: Path, capfd):
    code = ranks(
        """
        if rank == 1:
            raise ValueError("window: got -3")
        wait_for(reported(1))
        (folder / "gone").touch()
        neighbour_fails()
        """,
        processes=3,
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert re.match(r"longtrain: rank 1 \(pid \d+\) failed; the other ranks were stopped\n", shown)
    assert shown.endswith(f"the log of rank 1: {tmp_path / 'logs' / 'rank-1.log'}\n")
    assert shown.count("ValueError: window: got -3") == 1
    assert shown.count("Traceback") == 1
    assert "connection reset" not in shown
    assert "ValueError: window: got -3" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_shows_rank_0s_traceback_once(ranks, capfd):
    assert ranks("raise ValueError('boom')", processes=1) == 1
    shown = capfd.readouterr().err
    assert shown.count("ValueError: boom") == 1
    assert "other ranks" not in shown


def test_names_the_signal_that_killed_a_rank(ranks, capfd):
    begin = time.monotonic()
    code = ranks(
        """
        if rank == 1:
            (folder / "gone").touch()
            wait_for(reported(0))  # the neighbour is quicker to say so than this process is to notice
            os.kill(os.getpid(), signal.SIGKILL)
        neighbour_fails()
        """
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert re.match(r"longtrain: rank 1 \(pid \d+\) was killed by SIGKILL", shown)
    assert "connection reset" not in shown
    assert time.monotonic() - begin < 30


def test_an_abort_after_a_neighbours_failure_is_not_the_cause(ranks, capfd):
    code = ranks(
        """
        if rank == 1:
            raise ValueError("the cause")
        wait_for(reported(1))
        os.abort()
        """
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert "rank 1" in shown and "ValueError: the cause" in shown


def test_shows_the_log_of_a_rank_that_leaves_without_a_report(ranks, capfd):
    code = ranks(
        """
        if rank == 1:
            print("last words", file=sys.stderr)
            (folder / "gone").touch()
            wait_for(reported(0))
            os._exit(3)
        neighbour_fails()
        """
    )
    shown = capfd.readouterr().err
    assert code == 1
    assert "rank 1" in shown and "ended with exit code 3" in shown and "last words" in shown
    assert "connection reset" not in shown


def test_a_users_error_is_one_line_and_exit_code_2(ranks, capfd):
    code = ranks("raise UsageError('data.path: nothing at\\n  /nowhere')")
    assert code == 2
    assert capfd.readouterr().err == "longtrain: data.path: nothing at /nowhere\n"


def test_a_users_error_has_a_traceback_on_request(ranks, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("LONGTRAIN_TRACEBACK", "1")
    assert ranks("raise UsageError('no')") == 2
    assert "Traceback" in capfd.readouterr().err


def test_under_another_launcher_a_shared_users_error_comes_from_rank_0_alone(tmp_path: Path):
    script = write_script(tmp_path, "raise UsageError('recipe: wrong')")
    shared = script.read_text().replace("environment=os.environ", "environment=os.environ, on_all_ranks=True")
    said = {}
    for text, everywhere in ((script.read_text(), False), (shared, True)):
        script.write_text(text)
        for rank in "01":
            environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2"}
            ended = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
            assert ended.returncode == 2
            said[everywhere, rank] = ended.stderr
    line = "longtrain: recipe: wrong\n"
    assert said == {(False, "0"): line, (False, "1"): line, (True, "0"): line, (True, "1"): ""}


def test_leaving_runs_exit_handlers_and_writes_everything(tmp_path: Path):
    code = (
        "import atexit, threading, time\nfrom longtrain.errors import leave\natexit.register(print, 'handler')\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\nprint('printed')\nleave(3)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "printed\nhandler\n", "")


def test_a_rank_that_reported_but_does_not_leave_is_stopped(ranks, capfd):
    body = """
        if rank == 1:
            import atexit
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            atexit.register(time.sleep, 600)
            raise ValueError("and then it hangs")
        time.sleep(600)
        """
    assert ranks(body) == 1
    assert "and then it hangs" in capfd.readouterr().err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_launcher(tmp_path: Path, how: signal.Signals):
    script = write_script(
        tmp_path,
        """
        if rank == 1 and len(sys.argv) > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # stuck: only SIGKILL helps
        (folder / f"pid-{rank}").write_text(str(os.getpid()))
        time.sleep(600)
        """,
    )
    stuck = ["stuck"] if how == signal.SIGTERM else []
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        "import sys\nfrom pathlib import Path\nfrom longtrain.launch import local\n"
        "local.GRACE = 0.5\n"
        "sys.exit(local.run_ranks([sys.executable, *sys.argv[2:]], processes=2, logs=Path(sys.argv[1])))\n"
    )
    process = subprocess.Popen(
        [sys.executable, launcher, tmp_path / "logs", script, *stuck], stderr=subprocess.PIPE, text=True
    )
    pids: list[int] = []
    try:
        files = [tmp_path / "pid-0", tmp_path / "pid-1"]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        pids = [int(file.read_text()) for file in files]
        assert all(alive(pid) for pid in pids)
        process.send_signal(how)
        _, errors = process.communicate(timeout=20)
        wait_until(lambda: not any(alive(pid) for pid in pids))
    finally:
        process.kill()
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)
    if how != signal.SIGKILL:
        assert process.returncode == 128 + how
        assert errors == f"longtrain: stopped by {how.name}\n"


def test_what_a_rank_started_ends_with_it(ranks, tmp_path: Path):
    code = ranks(
        """
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        (folder / f"child-{rank}").write_text(str(child.pid))
        if rank == 0:
            time.sleep(600)
        wait_for(folder / "child-0")
        raise ValueError("stop")
        """
    )
    assert code == 1
    for rank in (0, 1):
        wait_until(lambda rank=rank: not alive(int((tmp_path / f"child-{rank}").read_text())), seconds=5)


def test_how_many_processes(monkeypatch: pytest.MonkeyPatch):
    from longtrain.config import compose

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert processes_for(compose("quickstart", ["launch.processes=4"])) == 4
    assert processes_for(compose("quickstart", ["launch.processes=null"])) == 1
    product = ["launch.processes=null", "parallel.data=2", "parallel.sequence=3", "trainer.sequences=2"]
    assert processes_for(compose("quickstart", product)) == 6
    with pytest.raises(UsageError, match="launch.device: got 'cuda'.*launch.device=cpu would work"):
        processes_for(compose("quickstart", ["launch.device=cuda"]))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert processes_for(compose("quickstart")) == 8  # launch.processes is for CPU
    assert processes_for(compose("quickstart", ["launch.device=cpu"])) == 2
