"""Which strategy a call runs, and the cost model that "auto" asks: bytes over the links and messages that wait in turn.

    print(explain_linear_attention(shard, mixer="delta_rule", heads=32, key_width=128))

With s the bytes of a state, t those of its transition, R runs on a rank and W ranks, forward and backward receive

    (W - 1) R (2 s + t)          in 1 message a scan with all-gather
    (W - 1) / W R (4 s + t)      in 2 with all-to-all
    s for each run, twice        one after the other along the chain
    every token's numbers twice  with Ulysses

All of it is counted as if nothing hid it: a rank's own work is the same in every strategy, and hides the first message
of each alike. What Ulysses saves, the pass that sums runs up, is not counted. So small states on few ranks are
gathered, larger ones or those of many ranks scattered.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch

from longtrain.kernels import checks
from longtrain.parallel.attention.cost import Hardware, hardware_of
from longtrain.parallel.heads import key_heads
from longtrain.parallel.linear.mixers import MIXERS, Mixer, Tensors
from longtrain.parallel.scan import scan_plan
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True)
class Estimate:
    """What the messages of one call, forward and backward, should cost in a strategy on the slowest rank."""

    strategy: str
    seconds: float
    messages: int  # that wait for one another
    received: float  # bytes that a rank receives, at most


def choose(strategy: str, mixer: Mixer, tensors: Tensors, shard: SequenceShard, *, return_state: bool) -> str:
    """What runs: what the caller names, or for "auto" the cheapest. Host arithmetic, the same on every rank."""
    if shard.world == 1:
        return "allgather"  # of one rank: no message
    if strategy != "auto":
        return strategy
    kept = shard.plans.setdefault(shard, {})
    shapes = tuple(None if x is None else (tuple(x.shape[2:]), x.shape[0], x.dtype) for x in tensors)
    key = ("linear", mixer.name, shapes, tensors[0].device.type, return_state)
    if key not in kept:
        hardware = hardware_of(tensors[0].device)
        kept[key] = estimates(mixer, tensors, shard, return_state=return_state, hardware=hardware)[0].strategy
    return kept[key]


def refusal(strategy: str, tensors: Tensors, shard: SequenceShard) -> str | None:
    """Why these heads and ranks do not allow a strategy; None where they do."""
    q, k, v = tensors[:3]
    if strategy != "ulysses" or shard.world == 1:
        return None
    others = "'allgather', 'alltoall' and 'chain' work with any"
    if shard.grid.outer_size > 1:
        rows = f"{shard.grid.outer_size} x {shard.grid.inner_size}"
        return f"over a mesh of {rows} ranks, expected a group of one dimension; {others}"
    if v.shape[2] % shard.world:
        return f"with H = {v.shape[2]} heads over {shard.world} ranks, which does not divide; {others} heads"
    if q.shape[2] != k.shape[2]:
        return f"with {q.shape[2]} heads of q and {k.shape[2]} of k, expected as many; {others} heads"
    return None


def estimates(
    mixer: Mixer, tensors: Tensors, shard: SequenceShard, *, return_state: bool, hardware: Hardware
) -> list[Estimate]:
    """What every strategy that the heads and ranks allow should cost, the cheapest first."""
    plan, sizes, world = scan_plan(shard), mixer.sizes(tensors), shard.world
    heads = sizes.batch * sizes.heads * sizes.dtype.itemsize
    state, transition = heads * sizes.rows * sizes.columns, heads * math.prod(sizes.transition)
    final, parts, share = state * return_state, len(sizes.parts), (world - 1) / world
    crosses = world > 1 and bool(plan.runs) and (plan.crosses or return_state)
    runs = plan.slots * crosses
    bandwidth = hardware.inner_bandwidth if shard.grid.outer_size == 1 else hardware.outer_bandwidth

    def estimate(strategy: str, messages: int, in_turn: float, received: float) -> Estimate:
        """in_turn: the bytes that come one after the other on the slowest way; received: on one rank."""
        messages *= crosses if strategy != "ulysses" else 1
        return Estimate(strategy, messages * hardware.latency + in_turn / bandwidth, messages, received)

    gathered = (world - 1) * (runs * (2 * state + transition) + final)
    scattered = share * (runs * (4 * state + transition) + 2 * final)
    # The longest way over runs that continue one another.
    hops = max(accumulate((run.continues for run in plan.runs), lambda way, on: (way + 1) * on, initial=0))
    most = max(len(before) + len(after) for before, after in zip(plan.continuing, plan.continued, strict=True))
    chained = 2 * (hops * state + final)
    found = [
        estimate("allgather", 1 + parts, gathered, gathered),
        estimate("alltoall", 2 + 2 * parts, scattered, scattered),
        estimate("chain", (hops + return_state) * (1 + parts), chained, most * state + (world - 1) * final),
    ]
    if refusal("ulysses", tensors, shard) is None:
        moved = share * _token_bytes(tensors, shard) + 2 * share * final
        found.append(estimate("ulysses", 4 + 2 * return_state, moved, moved))
    return sorted(found, key=lambda estimate: estimate.seconds)


def _token_bytes(tensors: Tensors, shard: SequenceShard) -> float:
    """The bytes of a rank's tokens in Ulysses' exchanges: all tensors and out; again, and dout, and the gradients."""
    q, v = tensors[0], tensors[2]
    heads, groups, tokens = v.shape[2], q.shape[2], max(shard.lengths) * q.shape[0]
    copies = len(key_heads(0, heads=heads, groups=groups, degree=shard.world)) * shard.world
    shared = copies * q.shape[3] * 2
    own = sum(heads * math.prod(x.shape[3:]) * x.itemsize for x in tensors[2:] if x is not None and x.ndim > 1)
    out = heads * v.shape[3] * q.itemsize
    return tokens * (2 * (shared * q.itemsize + own + out) + shared * max(q.itemsize, 4) + own)


def explain_linear_attention(
    shard: SequenceShard,
    *,
    heads: int,
    key_width: int,
    value_width: int | None = None,
    groups: int | None = None,
    slots: int | None = None,
    mixer: str = "linear_attention",
    decay: str | None = "token",
    return_state: bool = False,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    hardware: Hardware | None = None,
) -> str:
    """What the messages of each strategy should cost in forward and backward on this shard, as a table.

    The one that "auto" takes comes first. heads, groups (None: H), key_width, value_width (None: K), slots: H, G, K, V
    and M. mixer: "linear_attention", "delta_rule" or "slot_attention". decay: None, "head" [H], "token" [B, T, H] or
    "channel" [B, T, H, K]; slot attention's is always [B, T, H, M]. hardware: the figures to count with; None takes
    those of `device`. It sends nothing: ``SequenceShard.pretend`` will do. Raises ValueError for other arguments.
    """
    known = {known.name: known for known in MIXERS}
    if mixer not in known:
        raise ValueError(f"mixer: got {mixer!r}, expected one of {', '.join(map(repr, known))}")
    if (slots is None) == (mixer == "slot_attention"):
        raise ValueError(f"slots: got {slots} for {mixer!r}, expected a number for 'slot_attention' and None otherwise")
    groups, values = groups or heads, value_width or key_width
    checks.grouped_heads(heads, groups, name="groups")
    rows = (batch, shard.local_length)
    forms = {"head": (heads,), "token": (*rows, heads), "channel": (*rows, heads, key_width)}
    if decay is not None and decay not in forms:
        raise ValueError(f"decay: got {decay!r}, expected None, 'head', 'token' or 'channel'")
    shapes = {
        "q": (*rows, groups, key_width),
        "k": (*rows, groups, key_width),
        "v": (*rows, heads, values),
        "beta": (*rows, heads),
        "slot": (*rows, heads, slots or 1),
        "log_decay": (*rows, heads, slots) if slots else forms[decay] if decay else None,
    }
    given = [shapes[name] for name in known[mixer].arguments]
    tensors = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in given]
    known[mixer].check(tensors)
    figures = hardware or hardware_of(device)
    found = estimates(known[mixer], tensors, shard, return_state=return_state, hardware=figures)
    lines = [f"{'strategy':<12}{'ms':>12}{'messages':>10}{'MiB received':>14}"]
    lines += [
        f"{row.strategy:<12}{row.seconds * 1e3:>12.3f}{row.messages:>10}{row.received / 2**20:>14.3f}" for row in found
    ]
    lines.append(
        f"forward and backward; messages: that wait for one another; counted with {figures.inner_bandwidth:.1e} "
        f"bytes/s in a row, {figures.outer_bandwidth:.1e} between rows, {figures.latency:.0e} s a message"
    )
    return "\n".join(lines)
