"""The bytes that one rank's attention call holds at its peak, forward and backward, inputs included."""

import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from longtrain.bench_attention.cases import Case
from longtrain.bench_attention.sides import Longtrain, synchronize


def peak_bytes(case: Case, *, layout: str, strategy: str, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Peak bytes of the tensors allocated on `device` by this rank's q, k, v, dout, their call and its backward pass.

    All ranks of the group call it. On a CPU every allocation and release is counted by PyTorch's allocator, also those
    inside operators, kernels and backward passes, which a dispatch mode would not see.
    """
    if device.type != "cpu":
        return _peak_on_accelerator(case, layout=layout, strategy=strategy, group=group, device=device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side = Longtrain(case, layout=layout, strategy=strategy, group=group, device=device)
        with torch.profiler.record_function("longtrain.measured"):
            results = side.run()
    del results, side
    with tempfile.TemporaryDirectory(prefix="longtrain-bench-") as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return _peak(events)


def _peak(events: list[dict]) -> int:
    """The largest running total of a trace's allocations from the start of the call on; what lived before counts.

    Drawing the inputs takes more than the call (each process draws the whole sequence): that is left out.
    """
    (call,) = (event for event in events if event.get("name") == "longtrain.measured" and event.get("ph") == "X")
    held = peak = 0
    for event in sorted(
        (e for e in events if e.get("name") == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"])
    ):
        held += event["args"]["Bytes"]
        if event["ts"] >= call["ts"]:
            peak = max(peak, held)
    return peak


def _peak_on_accelerator(
    case: Case, *, layout: str, strategy: str, group: dist.ProcessGroup | None, device: torch.device
) -> int:
    # A first call gets what libraries keep from then on.
    Longtrain(case, layout=layout, strategy=strategy, group=group, device=device).run()
    before = torch.accelerator.memory_allocated(device)
    side = Longtrain(case, layout=layout, strategy=strategy, group=group, device=device)
    synchronize(device)
    torch.accelerator.reset_peak_memory_stats(device)
    results = side.run()
    synchronize(device)
    del results
    return torch.accelerator.max_memory_allocated(device) - before
