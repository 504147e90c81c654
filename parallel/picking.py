"""Rows that other ranks hold, picked one by one: each travels once to a rank that needs it, and nothing else does.

What a rank needs may depend on the data (routing, block attention), so plans are made in the call: each rank says which
rows it needs of all, by one gather of one byte per row, and every rank knows from that what it has to send.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from longtrain.parallel.communication import accumulation_dtype, all_gather_stacked, all_to_all_parts
from longtrain.parallel.shard import SequenceShard, shard_of


@dataclass(frozen=True)
class Picks:
    """Which rows a rank sends and receives. The rows lie as in a whole of which every rank holds consecutive ones.

    sends: local rows, int64, ordered by the rank that they go to. send_sizes, receive_sizes: rows per rank; those that
    stay count too. picked: the rows needed here, by their number in the whole, increasing, in which order they come.
    """

    sends: Tensor
    send_sizes: list[int]
    receive_sizes: list[int]
    picked: Tensor


def plan_picks(needed: Tensor, sizes: Sequence[int], shard: SequenceShard) -> Picks:
    """Agree on who sends what. All ranks call it; the host waits for the device.

    needed: bool ``[n]``, which rows of the whole this rank needs. sizes: rows that each rank holds of them, rank by
    rank, n in all.
    """
    sends, counts, picked = _pick(needed, sizes=list(sizes), shard=shard.handle)
    send_sizes, receive_sizes = counts.tolist()
    return Picks(sends, send_sizes, receive_sizes, picked)


def fetch(x: Tensor, picks: Picks, shard: SequenceShard) -> Tensor:
    """The picked rows: x ``[rows of this rank, ...]`` -> ``[picked rows, ...]``. All ranks call it.

    Differentiable: backward sends each row's gradient back, where the ranks' gradients are summed in the order of the
    ranks in float32 (float64 for float64).
    """
    return _fetch(x, picks.sends, send_sizes=picks.send_sizes, receive_sizes=picks.receive_sizes, shard=shard.handle)


@torch.library.custom_op(
    "longtrain::pick",
    mutates_args=(),
    # -> sends, (send_sizes, receive_sizes) on the CPU, picked: see `Picks`
    schema="(Tensor needed, *, SymInt[] sizes, SymInt shard) -> (Tensor, Tensor, Tensor)",
)
def _pick(needed: Tensor, *, sizes: Sequence[int], shard: int) -> tuple[Tensor, Tensor, Tensor]:
    own = shard_of(shard)
    every = all_gather_stacked(needed.to(torch.uint8), own.group).wait()
    # [W, n]; in a dry run nobody picks, and every row may be.
    wanted = np.ones(every.shape, bool) if isinstance(every, FakeTensor) else every.cpu().numpy().astype(bool)
    bounds = np.concatenate([[0], np.cumsum(np.asarray(sizes, dtype=np.int64))])
    first, stop = bounds[own.rank], bounds[own.rank + 1]
    sends = [np.flatnonzero(rows[first:stop]) for rows in wanted]
    picked = np.flatnonzero(wanted[own.rank])
    counts = np.array([[len(rows) for rows in sends], np.diff(np.searchsorted(picked, bounds))])
    sent, received = (torch.from_numpy(rows).to(needed.device) for rows in (np.concatenate(sends), picked))
    return sent, torch.from_numpy(counts), received


@torch.library.custom_op(
    "longtrain::fetch",
    mutates_args=(),
    schema="(Tensor x, Tensor sends, *, SymInt[] send_sizes, SymInt[] receive_sizes, SymInt shard) -> Tensor",
)
def _fetch(x: Tensor, sends: Tensor, *, send_sizes: Sequence[int], receive_sizes: Sequence[int], shard: int) -> Tensor:
    return all_to_all_parts(x.index_select(0, sends), send_sizes, receive_sizes, shard_of(shard).group)


@torch.library.custom_op(
    "longtrain::fetch_backward",
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor sends, *, SymInt[] send_sizes, SymInt[] receive_sizes, SymInt shard, SymInt rows) -> Tensor"
    ),
)
def _fetch_backward(
    dy: Tensor,
    sends: Tensor,
    *,
    send_sizes: Sequence[int],
    receive_sizes: Sequence[int],
    shard: int,
    rows: int,
) -> Tensor:
    back = all_to_all_parts(dy.contiguous(), receive_sizes, send_sizes, shard_of(shard).group)
    total = back.new_zeros((rows, *back.shape[1:]), dtype=accumulation_dtype(dy.dtype))
    start = 0
    for size in send_sizes:  # no row comes twice from one rank: the order of the sum is that of the ranks
        part = slice(start, start + size)
        total[sends[part]] += back[part]
        start += size
    return total.to(dy.dtype)


@_fetch.register_fake
def _fetch_shape(x: Tensor, sends: Tensor, *, send_sizes: Any, receive_sizes: Any, shard: int) -> Tensor:
    return x.new_empty((sum(receive_sizes), *x.shape[1:]))


@_fetch_backward.register_fake
def _fetch_backward_shape(
    dy: Tensor, sends: Tensor, *, send_sizes: Any, receive_sizes: Any, shard: int, rows: int
) -> Tensor:
    return dy.new_empty((rows, *dy.shape[1:]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    x, sends = inputs
    ctx.save_for_backward(sends)
    ctx.options = keyword_only_inputs | {"rows": x.shape[0]}
    if not torch.compiler.is_compiling():  # a handle keeps no shard alive
        ctx.shard = shard_of(keyword_only_inputs["shard"])


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
    return _fetch_backward(dy, *ctx.saved_tensors, **ctx.options), None


_fetch.register_autograd(_differentiate, setup_context=_save)
