"""What a function allocates on the CPU, counted by PyTorch's allocator: inside operators and backward passes too."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from longtrain.bench_common.measuring import memory_events, trace_events

_MEASURED = "what is measured"


class Allocated(NamedTuple):
    """Bytes, of tensors made inside the function only."""

    held: int  # when it ends, its result among them
    peak: int


def allocated(function: Callable[[], Any]) -> Allocated:
    """Call the function and count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.profiler.record_function(_MEASURED):
            result = function()
    del result
    events = trace_events(profiler)
    (call,) = (event for event in events if event.get("name") == _MEASURED and event.get("ph") == "X")
    held = peak = 0
    for event in memory_events(events):
        if call["ts"] <= event["ts"] <= call["ts"] + call["dur"]:
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return Allocated(held, peak)
