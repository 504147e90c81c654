"""Attention on another layout than the sequence's own, where that is faster.

A hybrid's home layout keeps runs of tokens long, for its linear mixers; packed documents may leave softmax attention
unbalanced there. Its few softmax layers can then move q, k and v to a layout that is even for attention, and the output
back: one all-to-all each way in forward, and one each way in backward. "auto" does so where the cost model finds that
the move costs less than it saves. All of it is host arithmetic that every rank does alike, once per batch.

Letters as in `longtrain.parallel.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.parallel import moves
from longtrain.parallel.agreement import check_shard, check_tokens
from longtrain.parallel.attention import ring
from longtrain.parallel.attention.call import AttentionCall, Window
from longtrain.parallel.attention.choice import choose, possible
from longtrain.parallel.attention.cost import Hardware, Heads, estimates, hardware_of
from longtrain.parallel.attention.plan import gather_plan
from longtrain.parallel.layouts import layout_named, layout_names
from longtrain.parallel.shard import SequenceShard

HOME, AUTO = "home", "auto"
BALANCED = "balanced"  # what "auto" weighs against the home layout


@dataclass(frozen=True)
class LayoutCost:
    """Forward and backward of one attention call on a layout, in seconds: the call itself, and the moves around it."""

    layout: str
    attention: float
    moves: float

    @property
    def seconds(self) -> float:
        return self.attention + self.moves


def check_layout(layout: object) -> None:
    """Refuse, with a ValueError, what attention cannot be asked to run on."""
    if not isinstance(layout, str):
        raise ValueError(f"layout: got {layout!r}, expected a name ({HOME}, {AUTO}, {', '.join(layout_names())})")
    if layout not in (HOME, AUTO):
        try:
            layout_named(layout)
        except ValueError as error:
            raise ValueError(f"{error}, or {HOME!r} or {AUTO!r}") from None


def attention_shard(
    shard: SequenceShard,
    sizes: Heads,
    *,
    device: torch.device | str,
    layout: str,
    strategy: str = "auto",
    ulysses_degree: int | None = None,
    causal: bool = True,
    window: Window = None,
) -> SequenceShard:
    """The shard on which attention over the tokens of `shard` runs: itself, or the same sequence laid out otherwise.

    layout: "home" (this shard's own), "auto" (what the cost model finds faster: home or balanced), or a layout's name.
    """
    if layout == HOME or shard.world == 1:
        return shard
    if layout != AUTO:
        return shard.with_layout(layout)
    kept = shard.plans.setdefault(shard, {})
    key = ("layout", strategy, ulysses_degree, sizes, torch.device(device).type, causal, window)
    if key not in kept:
        costs = layout_costs(
            shard,
            sizes,
            hardware=hardware_of(device),
            strategy=strategy,
            ulysses_degree=ulysses_degree,
            causal=causal,
            window=window,
        )
        kept[key] = min(costs, key=lambda cost: cost.seconds).layout
    chosen: str = kept[key]
    return shard if chosen == HOME else shard.with_layout(chosen)


def layout_costs(
    shard: SequenceShard,
    sizes: Heads,
    *,
    hardware: Hardware,
    strategy: str = "auto",
    ulysses_degree: int | None = None,
    causal: bool = True,
    window: Window = None,
) -> list[LayoutCost]:
    """What attention should cost at home and on the balanced layout, home first. Sends nothing."""
    costs, even = [], shard.with_layout(BALANCED)
    for name, target in ((HOME, shard), (BALANCED, even)) if even is not shard else ((HOME, shard),):
        found = estimates(target, target, sizes, causal=causal, window=window, hardware=hardware)
        fastest = possible(found, strategy, ulysses_degree, ranks=shard.world)[0].seconds
        costs.append(LayoutCost(name, float(fastest), _move_seconds(shard, target, sizes, hardware)))
    return costs


def moved(tensors: Sequence[Tensor], shard: SequenceShard, target: SequenceShard) -> list[Tensor]:
    """Tensors ``[B, T_w, heads, width]`` of one dtype, from `shard` to `target`, in one all-to-all; differentiable.

    The ranks compare what they were given first, so that none waits for a message that another does not send.
    """
    check_shard(shard, batch=tensors[0].shape[0])
    for x in tensors:
        check_tokens("q, k, v", x, shard)
    widths = [x.shape[2] * x.shape[3] for x in tensors]
    flat = torch.cat([x.flatten(2) for x in tensors], dim=-1)
    parts = moves.relayout(flat, shard, target, 1, parts=widths).split(widths, dim=-1)
    return [part.unflatten(-1, x.shape[2:]) for part, x in zip(parts, tensors, strict=True)]


def prepare_attention(
    shard: SequenceShard,
    sizes: Heads,
    *,
    device: torch.device | str,
    layout: str = HOME,
    strategy: str = "auto",
    ulysses_degree: int | None = None,
    causal: bool = True,
    window: Window = None,
) -> None:
    """Work out what self-attention calls with these options need to know of a batch: layout, strategy, intervals, plan.

    The calls would do it themselves, the first one for all layers; a data loader does it beside the step before.
    Sends nothing.
    """
    target = attention_shard(
        shard,
        sizes,
        device=device,
        layout=layout,
        strategy=strategy,
        ulysses_degree=ulysses_degree,
        causal=causal,
        window=window,
    )
    way, degree = choose(
        strategy,
        ulysses_degree,
        sizes=sizes,
        device=torch.device(device),
        shard=target,
        key_shard=target,
        causal=causal,
        window=window,
    )
    call = AttentionCall(
        shard=target,
        key_shard=target,
        causal=causal,
        window=window,
        scale=1.0,
        softcap=None,
        strategy=way,
        degree=degree,
        backend="auto",
        heads_at_once=sizes.at_once,
    )
    if way == "gather":
        call.planned(gather_plan)
    else:
        ring.plan_of(call)
    if target is not shard:
        _ = shard.relayout_plan(target), target.relayout_plan(shard)


def _move_seconds(shard: SequenceShard, target: SequenceShard, sizes: Heads, hardware: Hardware) -> float:
    """q, k, v there, out back; in backward dout there, dq, dk, dv back: for the rank that moves most."""
    if target is shard:
        return 0.0
    tokens = _crossing(shard, target)
    numbers = sizes.heads * (sizes.key_width + sizes.value_width)
    numbers += sizes.groups * (sizes.key_width + sizes.value_width)
    moved_bytes = 2 * tokens * sizes.batch * numbers * sizes.element_size
    bandwidth = hardware.inner_bandwidth if shard.grid.outer_size == 1 else hardware.outer_bandwidth
    return moved_bytes / bandwidth + 4 * hardware.latency


def _crossing(shard: SequenceShard, target: SequenceShard) -> int:
    """The most tokens that any rank has to send, or to receive, between the two shards."""
    world, length, bounds = shard.world, shard.length, shard.cu_seqlens
    runs = [shard.layout.runs(rank, world, length, bounds) for rank in range(world)]
    ends, starts = np.concatenate(runs), np.cumsum([0, *(len(held) for held in runs)])
    moves = np.zeros((world, world), dtype=np.int64)  # from each rank (row) to each (column)
    for rank in range(world):
        counted = target.layout.count(ends.reshape(-1), rank, world, length, bounds).reshape(-1, 2)
        sums = np.concatenate([[0], np.cumsum(counted[:, 1] - counted[:, 0])])
        moves[:, rank] = sums[starts[1:]] - sums[starts[:-1]]
    np.fill_diagonal(moves, 0)
    return int(max(moves.sum(0).max(), moves.sum(1).max()))
