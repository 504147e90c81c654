"""The test helper itself: what fails on a rank must fail the test, and say where."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankFailed, run_command, run_distributed, running_command


def add_up(rank: int, world: int, number: float) -> torch.Tensor:
    total = torch.tensor([rank + number])
    dist.all_reduce(total)
    return total


def raise_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("only here")
    dist.barrier()


def die_on_one(rank: int, world: int) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_one(rank: int, world: int) -> None:
    if rank == 1:
        time.sleep(1000)


def threads(rank: int, world: int) -> int:
    return torch.get_num_threads()


def test_results_come_in_rank_order() -> None:
    assert run_distributed(2, add_up, 0.5) == [torch.tensor([2.0])] * 2
    assert run_distributed(2, threads) == [1, 1]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (raise_on_one, ["rank 1 of 2 failed in raise_on_one", "in raise_on_one", "KeyError: 'only here'"]),
        (die_on_one, ["rank 0 of 2 failed in die_on_one: died with exit code -9"]),
        (hang_on_one, ["hang_on_one: ranks [1] of 2 did not answer in 1.0 s", "in hang_on_one"]),
    ],
)
def test_a_rank_that_fails_is_named_and_replaced(function, told: list[str]) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        run_distributed(2, function, timeout=1.0 if function is hang_on_one else 30.0)
    assert all(line in str(failure.value) for line in told), failure.value
    assert time.monotonic() - start < 60
    assert run_distributed(2, add_up, 0.0) == [torch.tensor([1.0])] * 2


def alive(process: int) -> bool:
    """Whether a process still runs; a zombie, which nobody has waited for yet, does not."""
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_commands_end_in_time_with_all_their_children(tmp_path) -> None:
    done = run_command([sys.executable, "-c", "import sys; print('said'); sys.exit(3)"], timeout=60)
    assert (done.returncode, done.stdout) == (3, "said\n")
    with pytest.raises(AssertionError, match="did not end in 0.5 s; it printed:\n(?s:.*)\\d+"):
        run_command(["sh", "-c", "sleep 1000 & echo $!; wait"], timeout=0.5)
    with running_command(["sh", "-c", "sleep 1000 & echo $!; wait"], output=tmp_path / "out") as process:
        while not (child := (tmp_path / "out").read_text()):
            time.sleep(0.01)
        assert alive(int(child)) and process.poll() is None
    deadline = time.monotonic() + 10
    while alive(int(child)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(int(child)) and process.returncode == -signal.SIGKILL
