"""How long a call takes and what memory it holds, on a CPU or a GPU; sides that are compared take turns."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from longtrain.bench_common.measuring import memory_events, synchronize, trace_events

Call = Callable[[], object]
SHORTEST = 0.02  # seconds that a sample on a GPU takes: shorter calls are repeated within it


@dataclass(frozen=True)
class Times:
    """Seconds of one call, for each sample."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def seconds(call: Call, device: torch.device, *, calls: int = 1) -> float:
    """The time of one call, averaged over some in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        results = call()
        del results  # freed at once, so that the next call gets the same memory
    synchronize(device)
    return (time.perf_counter() - start) / calls


def in_turn(sides: Mapping[str, Call], device: torch.device, *, repeats: int, warm_up: int = 1) -> dict[str, Times]:
    """Time each side once, then each again ...; `warm_up` calls of each come first and are not counted."""
    calls = {}
    for name, call in sides.items():
        for _ in range(warm_up):
            once = seconds(call, device)
        calls[name] = 1 if device.type == "cpu" or not warm_up else max(1, min(100, int(SHORTEST / once)))
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            samples[name].append(seconds(call, device, calls=calls[name]))
    return {name: Times(tuple(values)) for name, values in samples.items()}


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that a call holds at a time beyond what was there before; its results are among them.

    On a CPU PyTorch's allocator counts every allocation and release, also those inside operators and backward passes.
    """
    results = call()  # what libraries keep from their first call on is none of its memory
    del results
    gc.collect()
    if device.type != "cpu":
        synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        results = call()
        synchronize(device)
        del results
        return torch.accelerator.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = call()
        del results
    held = peak = 0
    for event in memory_events(trace_events(profiler)):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak
