"""The bytes that one rank's attention call holds at its peak, forward and backward, inputs included."""

from functools import partial

import torch
import torch.distributed as dist

from longtrain.bench_attention.cases import Case
from longtrain.bench_attention.sides import Longtrain
from longtrain.bench_common import measuring


def peak_bytes(case: Case, *, layout: str, strategy: str, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """Peak bytes of this rank's q, k, v, dout, their call and its backward pass (see `measuring.peak_bytes`)."""
    make = partial(Longtrain, case, layout=layout, strategy=strategy, group=group, device=device)
    return measuring.peak_bytes(make, device)
