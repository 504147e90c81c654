"""Seconds of a run, and the bytes of tensors that one rank holds at its peak."""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

MEASURED = "longtrain.measured"


class Runnable(Protocol):
    """A side holds its inputs; `run` is what is measured."""

    def run(self) -> object: ...


def synchronize(device: torch.device) -> None:
    """Wait for the device's work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(side: Runnable, *, group: dist.ProcessGroup | None, device: torch.device) -> float:
    """One timed run, in seconds; the group's ranks start together."""
    if group is not None:
        dist.barrier(group)
    synchronize(device)
    start = time.perf_counter()
    results = side.run()
    synchronize(device)
    elapsed = time.perf_counter() - start
    del results  # freed outside of the time
    return elapsed


def peak_bytes(make: Callable[[], Runnable], device: torch.device) -> int:
    """Peak bytes of the tensors on `device` of a side that `make` makes: its inputs, its run, all that lives meanwhile.

    All ranks of a group call it. On a CPU every allocation and release is counted by PyTorch's allocator, also those
    inside operators, kernels and backward passes, which a dispatch mode would not see.
    """
    if device.type != "cpu":
        return _peak_on_accelerator(make, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side = make()
        with torch.profiler.record_function(MEASURED):
            results = side.run()
    del results, side
    return _peak(trace_events(profiler))


def trace_events(profiler: profile) -> list[dict[str, Any]]:
    """What a profiler saw, with every allocation and release (`memory_events`) among it."""
    with tempfile.TemporaryDirectory(prefix="longtrain-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


def memory_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Allocations and releases in their order; ``args.Bytes``: how many, negative for a release."""
    memory = (event for event in events if event.get("name") == "[memory]")
    return sorted(memory, key=lambda event: (event["ts"], event["args"]["Ev Idx"]))


def _peak(events: list[dict[str, Any]]) -> int:
    """The largest running total of a trace's allocations from the start of the call on; what lived before counts.

    Drawing the inputs may take more than the call (each process draws the whole sequence): that is left out.
    """
    (call,) = (event for event in events if event.get("name") == MEASURED and event.get("ph") == "X")
    held = peak = 0
    for event in memory_events(events):
        held += event["args"]["Bytes"]
        if event["ts"] >= call["ts"]:
            peak = max(peak, held)
    return peak


def _peak_on_accelerator(make: Callable[[], Runnable], device: torch.device) -> int:
    make().run()  # a first call gets what libraries keep from then on
    before = torch.accelerator.memory_allocated(device)
    side = make()
    synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    results = side.run()
    synchronize(device)
    del results
    return torch.accelerator.max_memory_allocated(device) - before
