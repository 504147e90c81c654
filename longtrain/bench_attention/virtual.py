"""The critical path of W ranks' attention without their messages, measured by one process that plays them in turn."""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from longtrain.bench_attention.cases import Case, inputs
from longtrain.bench_common.measuring import synchronize
from longtrain.kernels.softmax_attention import attention_backward, attention_forward
from longtrain.parallel import SequenceShard


def critical_path(case: Case, *, layout: str, world: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Sums over the ring's steps of the slowest rank's kernel time, and what perfect balance would give.

    Returns:
        forward, backward: seconds, each (rank, step) the best of `repeats` after a warm-up. even: seconds, all
        ranks' time shared out evenly. pairs: the same sum in visible pairs over the even share, which the layout alone
        decides.
    """
    shards = [
        SequenceShard.pretend(case.length, rank=rank, world=world, layout=layout, cu_seqlens=case.boundaries)
        for rank in range(world)
    ]
    whole = inputs(case, torch.arange(case.length), torch.device("cpu"))
    held = [tuple(x[:, shard.positions].to(device) for x in whole) for shard in shards]
    forward, backward = (np.full((world, world), np.inf) for _ in range(2))  # [rank, step], seconds
    areas = np.zeros((world, world))
    for repeat in range(repeats + 1):
        for rank, shard in enumerate(shards):
            times = _play(shard, held, device)
            areas[rank] = [shard.intervals((rank - step) % world).area for step in range(world)]
            if repeat:  # the first is the warm-up
                forward[rank], backward[rank] = (
                    np.minimum(forward[rank], times[0]),
                    np.minimum(backward[rank], times[1]),
                )
    return {
        "forward": float(forward.max(0).sum()),
        "backward": float(backward.max(0).sum()),
        "even": float((forward.sum() + backward.sum()) / world),
        "pairs": float(areas.max(0).sum() / (areas.sum() / world)),
    }


def _play(
    shard: SequenceShard, held: list[tuple[Tensor, ...]], device: torch.device
) -> tuple[list[float], list[float]]:
    """One rank's forward and backward steps: seconds of each."""
    q, _, _, dout = held[shard.rank]
    state = torch.float32 if q.dtype.itemsize < 4 else q.dtype
    out = torch.zeros(q.shape, dtype=state, device=device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=state, device=device)
    dq, dout = torch.zeros_like(out), dout.to(state)
    options = {"scale": q.shape[3] ** -0.5, "softcap": None, "backend": "auto"}
    sources = [(shard.rank - step) % shard.world for step in range(shard.world)]
    forward, backward = [], []
    for source in sources:
        _, k, v, _ = held[source]
        call = partial(attention_forward, q, k, v, shard.intervals(source), out=out, lse=lse, **options)
        forward.append(_seconds(call, device))
    for source in sources:
        _, k, v, _ = held[source]
        dk, dv = (torch.zeros_like(x, dtype=state) for x in (k, v))
        gradients = {"out": out, "lse": lse, "dout": dout, "dlse": None, "dq": dq, "dk": dk, "dv": dv}
        call = partial(attention_backward, q, k, v, shard.intervals(source), **gradients, **options)
        backward.append(_seconds(call, device))
    return forward, backward


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start
