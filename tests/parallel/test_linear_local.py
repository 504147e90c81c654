"""Messages of the linear mixers travel while the rank computes: between a message's start and its wait lies work."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtrain.kernels.linear_attention import chunking
from longtrain.parallel.linear import allgather, alltoall, chain, engine, mixers
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group
from tests.parallel.linear_cases import Case, over_ranks

STARTS = {
    "allgather": (allgather, "all_gather_stacked"),
    "alltoall": (alltoall, "start_all_to_all_parts"),
    "chain": (chain, "Exchange"),
}
"""Where a strategy's first message of a pass begins; what follows it is waited for at once."""

RUNS = (mixers._OneStateForward, mixers._OneStateBackward, mixers._SlotForward, mixers._SlotBackward)


class Products(TorchDispatchMode):
    """Writes down every product of matrices."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self._events.append("product")
        return func(*args, **(kwargs or {}))


class Watched:
    """A message that writes down when it is waited for."""

    def __init__(self, message: Any, events: list[str]) -> None:
        self._message, self._events = message, events

    def wait(self) -> Any:
        self._events.append("wait")
        return self._message.wait()


def _events(case: Case, patch: pytest.MonkeyPatch) -> tuple[list[str], dict[str, Tensor]]:
    """What happens in forward and in backward, in order, and the call's results and gradients."""
    events: list[str] = []

    def scan(name: str) -> Callable[..., Any]:
        run = getattr(engine, name)

        def watched(*args: Any, **options: Any) -> Any:
            events.append(name)
            with Products(events):
                return run(*args, **options)

        return watched

    module, begins = STARTS[case.strategy]
    start = getattr(module, begins)

    def started(*args: Any, **options: Any) -> Any:
        message = start(*args, **options)
        if case.strategy == "chain" and not args[1]:  # it only sends
            return message
        events.append("start")
        return Watched(message, events)

    for name in ("scan_forward", "scan_backward"):
        patch.setattr(engine, name, scan(name))
    patch.setattr(module, begins, started)
    return events, over_ranks(case, torch.float32, world_group())


def _check(rank: int, world: int, mixer: str) -> None:
    for strategy in STARTS:
        for decay in ("token",) if mixer == "slot" else ("token", "channel", None):
            case = Case(mixer, tokens=700, decay=decay, strategy=strategy, initial=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chunking, "_CPU_TILE", 1)  # a chunk each: more tiles than are computed ahead
                events, found = _events(case, patch)
            backward = events.index("scan_backward")
            gradients = 2 if mixer == "slot" else 1  # messages of backward
            if strategy == "chain":
                expected = [int(rank == 1), gradients * (rank == 0)]
            else:
                expected = [1, gradients]
            for part, count in zip((events[:backward], events[backward:]), expected, strict=True):
                in_short = [event for event, _ in groupby(part)]
                starts = [index for index, event in enumerate(in_short) if event == "start"]
                assert len(starts) == count, (case, in_short)
                for index in starts:
                    assert in_short[index + 1 : index + 3] == ["product", "wait"], (case, in_short)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(chunking, "_CPU_TILE", 1)
                for run in RUNS:  # all in `finish`
                    patch.setattr(run, "local", lambda self, *entering: None)
                later = over_ranks(case, torch.float32, world_group())
            assert all(torch.equal(found[name], later[name]) for name in found), case


@pytest.mark.parametrize("mixer", ["linear", "delta", "slot"])
def test_ranks_compute_while_messages_travel_and_the_numbers_are_the_same(mixer: str) -> None:
    run_distributed(2, _check, mixer)
