"""The cost model of attention over ranks: FLOPs of the slowest rank and bytes over the links, step by step.

It says how long forward and backward of one call should take in each strategy, and "auto" takes the shortest. What it
counts is host data that every rank derives alike: the visible pairs of every rank's queries with every rank's keys, and
the keys that have to travel for them. From long sequences it takes a sample of the queries.

    print(explain_attention(shard, heads=32, kv_heads=8, head_width=128))

The model: a ring's step takes as long as its slowest rank's work or the transfer for the next step, whichever is
longer; a double ring's transfer between rows has all rounds of a row to hide behind; all-gather shows the first heads'
transfer; Ulysses shows all of its exchanges. Backward is 2.5 times forward's work, and moves K and V again and float32
dK and dV.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.intervals import visible_keys
from longtrain.parallel.attention.call import Window
from longtrain.parallel.heads import key_heads
from longtrain.parallel.layouts import positions_in_runs
from longtrain.parallel.shard import SequenceShard

_EVALUATIONS = 1 << 20  # (query, rank) pairs looked at, at most: about 20 ms
_BACKWARD = 2.5  # times forward's work: five matrix products for two
_GATHERS = 4  # all-gathers of heads that a call is taken to make, where it has so many key heads


@dataclass(frozen=True)
class Hardware:
    """What one rank's device and links attain: FLOP/s in attention kernels, bytes/s each way, seconds to start a
    message.

    inner: between ranks of a row (or of a plain group); outer: between rows.
    """

    flops: float
    inner_bandwidth: float
    outer_bandwidth: float
    latency: float


# cpu: what one core of a server and gloo between two processes attained, by a few runs. cuda: published figures of an
# H100 in bfloat16 with a flash kernel, NVLink and one 400 Gb/s adapter per GPU; not measured here, and too fast for
# float32 and for tiles of matrix products.
_HARDWARE = {
    "cpu": Hardware(flops=7e10, inner_bandwidth=4e8, outer_bandwidth=4e8, latency=3e-4),
    "cuda": Hardware(flops=5e14, inner_bandwidth=3.5e11, outer_bandwidth=4.5e10, latency=2e-5),
}


def hardware_of(device: torch.device | str) -> Hardware:
    """The figures that "auto" counts with on a device."""
    return _HARDWARE["cpu" if torch.device(device).type == "cpu" else "cuda"]


@dataclass(frozen=True)
class Heads:
    """The sizes of a call besides its tokens: B, H, G, K, V, and the bytes of one number of q, k and v."""

    batch: int
    heads: int
    groups: int
    key_width: int
    value_width: int
    element_size: int
    at_once: int | None = None  # key heads that a pass works on; None: all

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, *, at_once: int | None = None) -> "Heads":
        """The sizes of these tensors."""
        return cls(q.shape[0], q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.element_size(), at_once)

    def passes(self, groups: int) -> int:
        """How often a rank that works on so many key heads goes through the keys."""
        return 1 if self.at_once is None else -(-groups // self.at_once)


@dataclass(frozen=True)
class Estimate:
    """What forward and backward of one call should cost in a strategy, on the rank that is slowest in each step."""

    strategy: str  # "ring", "allgather", "ulysses" or "mesh"
    degree: int  # ranks that exchange heads
    seconds: float
    work: float  # FLOPs in forward: the sum over steps of the slowest rank's
    sent: float  # bytes that a rank receives, at most, forward and backward
    exposed: float  # seconds that nothing hides


def degrees(inner: int, heads: int) -> list[int]:
    """The Ulysses degrees that are possible: divisors of the ranks in a row and of the query heads, from 1 on."""
    return [degree for degree in range(1, inner + 1) if inner % degree == 0 and heads % degree == 0]


@dataclass(frozen=True, eq=False)
class Traffic:
    """For every rank's queries (rows) and every rank's keys (columns), float64 [W, W]."""

    pairs: np.ndarray  # visible (query, key) pairs
    keys: np.ndarray  # keys from the first to the last that the queries see

    def teams(self, degree: int) -> "Traffic":
        """The same for teams of `degree` neighbouring ranks."""
        count = len(self.pairs) // degree
        blocks = (count, degree, count, degree)
        return Traffic(self.pairs.reshape(blocks).sum((1, 3)), self.keys.reshape(blocks).max(1).sum(2))


def traffic(shard: SequenceShard, key_shard: SequenceShard, *, causal: bool, window: Window) -> Traffic:
    """Count the pairs and keys; a sample of the queries where there are many. The same on every rank."""
    world = shard.world
    stride = max(1, -(-shard.length * world // _EVALUATIONS))
    ends, counts, weights = [], [], []
    for rank in range(world):
        positions = positions_in_runs(shard.layout.runs(rank, world, shard.length, shard.cu_seqlens))
        sample = positions[(min(stride, positions.size) - 1) // 2 :: stride]
        first, stop = visible_keys(
            sample,
            causal=causal,
            window=window,
            query_offsets=shard.cu_seqlens,
            key_offsets=key_shard.cu_seqlens,
        )
        ends.append(np.stack([first, stop]))
        counts.append(sample.size)
        weights.append(positions.size / max(sample.size, 1))
    every, pairs, keys = np.concatenate(ends, axis=1), np.zeros((world, world)), np.zeros((world, world))
    starts = np.cumsum(counts) - counts
    filled = np.flatnonzero(counts)
    for source in range(world):
        layout, size = key_shard.layout, key_shard.length
        lo, hi = layout.count(every.reshape(-1), source, world, size, key_shard.cu_seqlens).reshape(2, -1)
        if not filled.size:
            continue
        seen = hi > lo
        pairs[filled, source] = np.add.reduceat(hi - lo, starts[filled])
        last = np.maximum.reduceat(np.where(seen, hi, 0), starts[filled])
        first = np.minimum.reduceat(np.where(seen, lo, size), starts[filled])
        keys[filled, source] = np.maximum(last - first, 0)
    return Traffic(pairs * np.asarray(weights)[:, None], keys)


def estimates(
    shard: SequenceShard, key_shard: SequenceShard, sizes: Heads, *, causal: bool, window: Window, hardware: Hardware
) -> list[Estimate]:
    """What every strategy that these heads allow should cost, the shortest first."""
    kept = shard.plans.setdefault(key_shard, {})
    key = ("traffic", causal, window)
    if key not in kept:
        kept[key] = traffic(shard, key_shard, causal=causal, window=window)
    counted: Traffic = kept[key]
    found = [
        _ring(shard, key_shard, counted, sizes, degree, hardware)
        for degree in degrees(shard.grid.inner_size, sizes.heads)
    ]
    found.append(_gather(shard, key_shard, counted, sizes, hardware))
    return sorted(found, key=lambda estimate: estimate.seconds)


def explain_attention(
    shard: SequenceShard,
    *,
    heads: int,
    kv_heads: int,
    head_width: int,
    value_width: int | None = None,
    key_shard: SequenceShard | None = None,
    causal: bool = True,
    window: Window = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    hardware: Hardware | None = None,
) -> str:
    """What each strategy should cost in forward and backward on this shard, as a table, the one that "auto" takes
    first.

    heads, kv_heads, head_width, value_width: H, G, K and V (None: K). hardware: the figures to count with; None takes
    those of `device`. It sends nothing: ``SequenceShard.pretend`` will do.
    """
    checks.grouped_heads(heads, kv_heads, name="kv_heads")
    window = checks.attention_window(window)
    sizes = Heads(batch, heads, kv_heads, head_width, value_width or head_width, dtype.itemsize)
    figures = hardware or hardware_of(device)
    rows = estimates(shard, key_shard or shard, sizes, causal=causal, window=window, hardware=figures)
    lines = [f"{'strategy':<12}{'degree':>7}{'ms':>12}{'exposed ms':>12}{'TFLOP':>12}{'MiB received':>14}"]
    lines += [
        f"{row.strategy:<12}{row.degree:>7}{row.seconds * 1e3:>12.3f}{row.exposed * 1e3:>12.3f}"
        f"{row.work / 1e12:>12.4f}{row.sent / 2**20:>14.1f}"
        for row in rows
    ]
    lines.append(
        f"forward and backward; TFLOP: forward, sum over steps of the slowest rank; counted with {figures.flops:.1e} "
        f"FLOP/s, {figures.inner_bandwidth:.1e} bytes/s in a row, {figures.outer_bandwidth:.1e} between rows, "
        f"{figures.latency:.0e} s a message"
    )
    return "\n".join(lines)


def _ring(
    shard: SequenceShard, key_shard: SequenceShard, counted: Traffic, sizes: Heads, degree: int, hardware: Hardware
) -> Estimate:
    """A ring over teams of `degree` ranks, each with its share of the heads."""
    grid, of_teams = shard.grid, counted.teams(degree)
    groups = len(key_heads(0, heads=sizes.heads, groups=sizes.groups, degree=degree))
    width = sizes.key_width + sizes.value_width
    per_pair = 2 * sizes.batch * sizes.heads / degree * width
    per_key = sizes.batch * groups * width
    inner, outer, latency = grid.inner_size // degree, grid.outer_size, hardware.latency * sizes.passes(groups)
    team = np.arange(inner * outer)
    row, place = team // inner, team % inner
    seconds = exposed = work = received = 0.0
    # Numbers of element_size bytes that come for a key, and float32 ones that go back; and forward's work, times.
    for forward_bytes, backward_bytes, factor in ((sizes.element_size, 0, 1.0), (sizes.element_size, 4, _BACKWARD)):
        bytes_per_key = per_key * (forward_bytes + backward_bytes)
        for u in range(outer):
            stage = 0.0
            for s in range(inner):
                source = (row - u) % outer * inner + (place - s) % inner
                flops = per_pair * of_teams.pairs[team, source].max()
                work += flops if backward_bytes == 0 else 0.0
                following = (row - u) % outer * inner + (place - s - 1) % inner
                keys = of_teams.keys[team, following].max() if s + 1 < inner else 0.0
                moved = keys * bytes_per_key
                compute = factor * flops / hardware.flops
                transfer = moved / hardware.inner_bandwidth + (latency if moved else 0.0)
                stage += max(compute, transfer)
                exposed += max(transfer - compute, 0.0)
                received += moved
            # What a row sees of the block that comes next from another row.
            across = 0.0
            if u + 1 < outer:
                base = (row - u - 1) % outer * inner + place
                rows_keys = of_teams.keys.reshape(outer, inner, -1).max(1)
                moved = rows_keys[row, base].max() * bytes_per_key
                across = moved / hardware.outer_bandwidth + (latency if moved else 0.0)
                received += moved
            seconds += max(stage, across)
            exposed += max(across - stage, 0.0)
    heads_seconds, heads_bytes = _exchange_of_heads(shard, key_shard, sizes, degree, groups, hardware)
    name = "ring" if degree == 1 else "ulysses" if degree == shard.world else "mesh"
    return Estimate(name, degree, seconds + heads_seconds, work, received + heads_bytes, exposed + heads_seconds)


def _exchange_of_heads(
    shard: SequenceShard, key_shard: SequenceShard, sizes: Heads, degree: int, groups: int, hardware: Hardware
) -> tuple[float, float]:
    """Seconds and bytes of Ulysses' exchanges: q, k, v, out and lse in forward; dout, dlse, dq, dk, dv in backward."""
    if degree == 1:
        return 0.0, 0.0
    queries, keys = max(shard.lengths), max(key_shard.lengths)
    width, size = sizes.key_width + sizes.value_width, sizes.element_size
    of_queries = 2 * queries * sizes.heads * (width * size + 4)
    of_keys = keys * groups * degree * width * (size + 4)
    moved = sizes.batch * (of_queries + of_keys) * (degree - 1) / degree
    return moved / hardware.inner_bandwidth + 4 * hardware.latency, moved


def _gather(
    shard: SequenceShard, key_shard: SequenceShard, counted: Traffic, sizes: Heads, hardware: Hardware
) -> Estimate:
    """All keys to all ranks, group by group of heads; in backward dK and dV straight home, to and from all ranks."""
    width, others = sizes.key_width + sizes.value_width, shard.world - 1
    flops = 2 * sizes.batch * sizes.heads * width * counted.pairs.sum(1).max()
    gathered = sizes.batch * sizes.groups * width * sizes.element_size * max(key_shard.lengths) * others
    shown = counted.keys - np.diag(np.diag(counted.keys))
    returned = sizes.batch * sizes.groups * width * 4 * float(max(shown.sum(0).max(), shown.sum(1).max()))
    passes = sizes.passes(sizes.groups)
    steps = min(sizes.groups, max(_GATHERS, passes))
    grid = shard.grid
    bandwidth = hardware.inner_bandwidth if grid.outer_size == 1 else hardware.outer_bandwidth
    seconds = exposed = 0.0
    for moved, factor in ((gathered, 1.0), (gathered + returned, _BACKWARD)):
        if not others:
            moved = 0.0
        compute = factor * flops / hardware.flops
        transfer = moved / bandwidth + (steps * hardware.latency if moved else 0.0)
        shown_first = transfer * passes / steps  # each pass waits for its first
        hidden = max(transfer - shown_first - compute * (steps - passes) / steps, 0.0)
        seconds += compute + shown_first + hidden
        exposed += shown_first + hidden
    return Estimate("allgather", 1, seconds, flops, 2 * gathered + returned, exposed)
