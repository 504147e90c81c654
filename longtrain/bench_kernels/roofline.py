"""The least time that hardware allows each operator, and how near to it its design can come: only arithmetic.

`least` counts what every implementation must do: each input read once, each result written once, and the operations of
the formula. `design` counts what longtrain's kernels do, one launch (or kind of launch) after the other: each takes the
longer one of its operations and its bytes, and the launches' times add up. The share of the floor that the design can
reach is the quotient; what is measured beyond that (launches, tails, half-used units) is for tuning to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longtrain.kernels.intervals import KeyIntervals

HALF, SINGLE = 2, 4  # bytes of a number
CHUNK = 64  # tokens of the linear operators' chunks
TILE = 128  # queries and keys of a masked block of softmax attention
TILE_OF_LOGITS = 8192  # tokens and vocabulary of a tile of logits


@dataclass(frozen=True)
class Card:
    """What a card's data sheet promises: FLOP/s of dense bfloat16 products, and bytes/s of its memory."""

    name: str
    flops: float
    bandwidth: float
    source: str


CARDS = (
    Card("A100", 312e12, 2.039e12, "NVIDIA A100 datasheet, 80 GB SXM: 312 TFLOPS, 2,039 GB/s"),
    Card("H100", 989e12, 3.35e12, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS with sparsity, which is 2 x, 3.35 TB/s"),
    Card("H200", 989e12, 4.8e12, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS with sparsity, 4.8 TB/s"),
    Card("B200", 2250e12, 8e12, "NVIDIA DGX B200 datasheet, an eighth of it: 72 PFLOPS FP8 with sparsity, 64 TB/s"),
)


@dataclass(frozen=True)
class Step:
    """Some work: operations of matrix products, and bytes of memory moved."""

    name: str
    flops: float
    bytes: float

    def seconds(self, card: Card) -> float:
        """The longer one of both."""
        return max(self.flops / card.flops, self.bytes / card.bandwidth)


@dataclass(frozen=True)
class Work:
    """One pass of an operator at one shape."""

    operator: str
    shape: str
    direction: str  # "forward" or "backward"
    least: Step
    design: tuple[Step, ...]

    def floor(self, card: Card) -> float:
        """Seconds that no implementation can go below."""
        return self.least.seconds(card)

    def reachable(self, card: Card) -> float:
        """Seconds that the design can come down to."""
        return sum(step.seconds(card) for step in self.design)


Pair = tuple[Work, Work]  # forward, backward


def softmax(
    intervals: KeyIntervals, what: str, *, batch: int, heads: int, kv_heads: int, key_width: int, value_width: int
) -> Pair:
    """Softmax attention over the visible pairs of `intervals`; without atomic additions dQ computes P and dP again."""
    queries, keys = intervals.lo.size, intervals.keys
    shape = f"{what}, B {batch}, T {queries:,}, H {heads}, G {kv_heads}, K {key_width}"
    pair = 2 * batch * heads * intervals.area
    tiled = 2 * batch * heads * tiled_area(intervals)
    q, out = (HALF * batch * queries * heads * width for width in (key_width, value_width))
    k, v = (HALF * batch * keys * kv_heads * width for width in (key_width, value_width))
    lse = SINGLE * batch * queries * heads
    both, inputs = key_width + value_width, q + k + v
    forward = Work(
        "softmax_attention",
        shape,
        "forward",
        Step("all", pair * both, inputs + out + lse),
        (Step("out", tiled * both, inputs + out + lse),),
    )
    backward = Work(
        "softmax_attention",
        shape,
        "backward",
        Step("all", pair * (3 * key_width + 2 * value_width), 2 * inputs + 2 * out + lse),
        (
            Step("delta", 0, 2 * out + 3 * lse),
            Step("dq", tiled * (2 * key_width + value_width), inputs + out + 2 * lse + q),
            Step("dk, dv", tiled * 2 * both, inputs + out + 2 * lse + k + v),
        ),
    )
    return forward, backward


def tiled_area(intervals: KeyIntervals) -> int:
    """Pairs of all blocks of `TILE` queries and keys in which any pair is visible."""
    starts = np.arange(0, intervals.lo.size, TILE)
    lo, hi = np.minimum.reduceat(intervals.lo, starts), np.maximum.reduceat(intervals.hi, starts)
    blocks = np.where(hi > lo, -(-hi // TILE) - lo // TILE, 0)
    return int(blocks.sum()) * TILE * TILE


def linear(*, batch: int, tokens: int, heads: int, key_width: int, value_width: int, decay: str) -> Pair:
    """Linear attention with decay "head", "token" or "channel" (as wide as k).

    Cut into parts inside the card: parts are summed up first, which reads k and v (backward q and dout) once more.
    Decays per channel go into q and k beforehand; these, and scores within chunks, are written and read again.
    """
    size = HALF * batch * tokens * heads  # bytes for a width of 1
    k, v, scores = size * key_width, size * value_width, size * CHUNK
    g = {"head": 0, "token": 2 * size, "channel": k}[decay]  # per token in float32
    number = batch * tokens * heads
    state, within = 2 * number * key_width * value_width, 2 * number * CHUNK * (key_width + value_width)
    if decay == "channel":
        levels = 2 * number * CHUNK * key_width * (CHUNK.bit_length() - 1)
        prepare = Step("decays into q, k", levels, 2 * k + g + 2 * k + scores)
        forward = (
            prepare,
            Step("states of parts", state, k + v),
            Step("out", 2 * state + 2 * number * CHUNK * value_width, 2 * k + 2 * v + scores),
        )
        backward = (
            prepare,
            Step("states of parts", 2 * state, 2 * (k + v)),
            Step("dq", 2 * state, v + k + v + k),
            Step("dk", 2 * state, v + k + v + k),
            Step("dv", 2 * state + within, 2 * k + v + scores + v),
            Step("decays out of dq, dk", 4 * levels, 4 * k + g + 2 * v + 2 * k + g),
        )
    else:
        forward = (Step("states of parts", state, k + v + g), Step("out", 2 * state + within, 2 * k + 2 * v + g))
        backward = (
            Step("states of parts", 2 * state, 2 * (k + v + g)),
            Step("dq", 2 * state + within, 2 * v + 2 * k + g),
            Step("dk, dv", 3 * state + 2 * within, 2 * k + 2 * v + k + v + g),
        )
    shape = f"decay per {decay}, B {batch}, T {tokens:,}, H {heads}, K {key_width}, V {value_width}"
    return (
        Work("linear_attention", shape, "forward", Step("all", 2 * state, 2 * k + 2 * v + g), forward),
        Work("linear_attention", shape, "backward", Step("all", 5 * state, 4 * k + 3 * v + 2 * g), backward),
    )


def delta_rule(*, batch: int, tokens: int, heads: int, key_width: int, value_width: int) -> Pair:
    """The gated delta rule with one decay per head, in WY form: chunks' matrices and states are written and read."""
    size = HALF * batch * tokens * heads
    k, v, matrix = size * key_width, size * value_width, size * CHUNK
    states, gates = size * key_width * value_width // CHUNK, 4 * size  # beta and log-decay in float32
    number = batch * tokens * heads
    state = 2 * number * key_width * value_width
    by_k, by_v = (2 * number * CHUNK * width for width in (key_width, value_width))
    inversion = 2 * number * CHUNK * CHUNK * 2 * (CHUNK.bit_length() - 1)
    prepare = (
        Step("pairs", 2 * by_k + inversion, 2 * k + gates + 2 * matrix),
        Step("apply", by_k + by_v, k + v + matrix + k + v),
        Step("states", 2 * state, 2 * k + 2 * v + states),
    )
    forward = (*prepare, Step("outputs", state + by_v, k + matrix + states + v + v))
    backward = (
        *prepare,
        Step("dvalues", by_v, matrix + 2 * v),
        Step("dstates", 3 * state, 3 * k + 3 * v + states),
        Step("pair gradients", 3 * by_v, 4 * v + 4 * matrix + 2 * v + 2 * matrix),
        Step("input gradients", 4 * state + 4 * by_k, 2 * k + 3 * v + 2 * states + 2 * matrix + 2 * k + gates),
    )
    shape = f"decay per token, B {batch}, T {tokens:,}, H {heads}, K {key_width}, V {value_width}"
    return (
        Work("gated_delta_rule", shape, "forward", Step("all", 3 * state, 2 * k + 2 * v + gates), forward),
        Work("gated_delta_rule", shape, "backward", Step("all", 8 * state, 4 * k + 3 * v + 2 * gates), backward),
    )


def slot_attention(*, batch: int, tokens: int, heads: int, width: int, slots: int) -> Pair:
    """Gated slot attention as two passes of linear attention, with decays per value and per key, and a softmax."""
    size = HALF * batch * tokens * heads
    x, m = size * width, size * slots
    state = 2 * batch * tokens * heads * width * slots
    passes = linear(batch=batch, tokens=tokens, heads=heads, key_width=slots, value_width=width, decay="channel")
    forward, backward = (2 * work.design for work in passes)
    shape = f"B {batch}, T {tokens:,}, H {heads}, K {width}, M {slots}"
    softmax_step, dsoftmax = Step("softmax", 0, 2 * m), Step("dsoftmax", 0, 3 * m)
    return (
        Work("gated_slot_attention", shape, "forward", Step("all", 4 * state, 4 * x + 2 * m), (*forward, softmax_step)),
        Work(
            "gated_slot_attention",
            shape,
            "backward",
            Step("all", 10 * state, 7 * x + 4 * m),
            (*passes[0].design, softmax_step, *backward, dsoftmax),
        ),
    )


def convolution(*, batch: int, tokens: int, width: int, taps: int) -> Pair:
    """The causal convolution: a few operations for each number moved, none of them matrix products."""
    x = HALF * batch * tokens * width
    shape = f"B {batch}, T {tokens:,}, D {width}, {taps} taps"
    forward, backward = Step("y", 0, 2 * x), Step("dx, dweight", 0, 3 * x)
    return (
        Work("causal_conv1d", shape, "forward", forward, (forward,)),
        Work("causal_conv1d", shape, "backward", backward, (backward,)),
    )


def cross_entropy(*, tokens: int, width: int, vocabulary: int) -> Pair:
    """Cross-entropy of a linear head; without keeping the logits, backward computes them again."""
    product = 2 * tokens * width * vocabulary
    hidden, weight = HALF * tokens * width, HALF * vocabulary * width
    logits = tokens * vocabulary
    tiles_of_tokens, tiles_of_vocabulary = (-(-x // TILE_OF_LOGITS) for x in (tokens, vocabulary))
    # Sums are written for each tile, read for all but the first, and then rounded.
    touched = tokens * (2 * tiles_of_vocabulary - 1) + vocabulary * (2 * tiles_of_tokens - 1)
    sums = (SINGLE * touched + (SINGLE + HALF) * (tokens + vocabulary)) * width
    again = HALF * (tokens * tiles_of_vocabulary + vocabulary * tiles_of_tokens) * width  # hidden, weight for each tile
    forward = (
        Step("logits", product, again + SINGLE * logits),
        Step("sums of exponentials", 0, SINGLE * logits),
    )
    backward = (
        Step("logits", product, again + SINGLE * logits),
        Step("dz", 0, (SINGLE + HALF) * logits),
        Step("sums", 0, sums),  # as if they never came in while other blocks multiply
        Step("dhidden, dweight", 2 * product, again + 2 * HALF * logits),
    )
    shape = f"N {tokens:,}, D {width}, vocabulary {vocabulary:,}"
    return (
        Work("linear_cross_entropy", shape, "forward", Step("all", product, hidden + weight), forward),
        Work("linear_cross_entropy", shape, "backward", Step("all", 2 * product, 2 * (hidden + weight)), backward),
    )


def causal(tokens: int, *, documents: Sequence[int] = (), window: int | None = None) -> KeyIntervals:
    """Causal key intervals of documents packed in one row, with a window of so many tokens to the left."""
    bounds = np.concatenate(([0], np.cumsum(documents or (tokens,)))).astype(np.int64)
    query = np.arange(bounds[-1], dtype=np.int64)
    lo = np.repeat(bounds[:-1], np.diff(bounds))
    return KeyIntervals(lo if window is None else np.maximum(lo, query - window), query + 1, int(bounds[-1]))


def works() -> list[Work]:
    """The operators at the shapes that their bars are set for."""
    heads = {"batch": 1, "heads": 32}
    attention = {**heads, "kv_heads": 8, "key_width": 128, "value_width": 128}
    wide = {**heads, "tokens": 131_072, "key_width": 128, "value_width": 128}
    pairs = [softmax(causal(tokens), "causal", **attention) for tokens in (8192, 32_768, 131_072)]
    pairs += [
        softmax(causal(32_768, documents=[2048] * 16), "16 documents", **attention),
        softmax(causal(32_768, window=4095), "window of 4096", **attention),
        *(linear(**wide, decay=decay) for decay in ("head", "token", "channel")),
        delta_rule(**wide),
        slot_attention(**heads, tokens=131_072, width=128, slots=64),
        convolution(batch=1, tokens=131_072, width=4096, taps=4),
        cross_entropy(tokens=32_768, width=4096, vocabulary=131_072),
    ]
    return [work for pair in pairs for work in pair]


def document() -> str:
    """Markdown: the cards, the floors, the designs."""
    cards = "\n".join(
        f"| {card.name} | {card.flops / 1e12:,.0f} | {card.bandwidth / 1e12:.2f} | {card.source} |" for card in CARDS
    )
    header = "".join(f" {card.name}: floor ms | reachable ms | share |" for card in CARDS)
    lines = []
    for work in works():
        cells = "".join(
            f" {1e3 * work.floor(card):.2f} | {1e3 * work.reachable(card):.2f} "
            f"| {work.floor(card) / work.reachable(card):.2f} |"
            for card in CARDS
        )
        moved, done = work.least.bytes / 1e9, work.least.flops / 1e12
        lines.append(f"| {work.operator} | {work.shape} | {work.direction} | {done:.2f} | {moved:.2f} |{cells}")
    return f"{_INTRODUCTION}\n\n{_CARD_HEADER}\n{cards}\n\n{_HEADER}{header}\n" + "\n".join(
        ["|" + "---|" * (5 + 3 * len(CARDS)), *lines]
    )


_INTRODUCTION = """\
# Floors of the kernels

Written by `longtrain bench kernels --roofline`: arithmetic, nothing here is measured. bfloat16; TFLOP and GB are what
every implementation must do (`least` in `longtrain/bench_kernels/roofline.py`), the floor is the longer one of
operations at the card's peak and bytes at its bandwidth, and reachable is the same for each launch of longtrain's
Triton kernels, added up. What keeps the share below 1, by design:

- softmax attention: backward computes P and dP twice, for dQ and for dK and dV (7 products instead of 5), since nothing
  is added atomically; where `auto` takes a vendor's kernel instead, that does not hold. Masked blocks are computed
  whole. Exponentials are not counted: on Hopper they take about half as long as the products at K 128.
- linear attention: to fill a card with one row, sequences are cut into parts whose states are summed up first, which
  reads k and v once more (in backward q and dout too); backward walks the tokens twice. Counted as if all parts were
  read again; the last ones are not.
- decays per channel and slot attention: q and k with their decays, and scores within chunks, are written and read.
- the gated delta rule: chunks' matrices in WY form, U, W and a state per chunk are written and read between kernels,
  and backward makes them again.
- cross-entropy: backward computes the logits again (3 products instead of 2); logits are float32 in memory for a
  tile's time; sums of the gradients are read and written for each tile."""
_CARD_HEADER = "| card | dense bfloat16 TFLOP/s | TB/s | source |\n|---|---|---|---|"
_HEADER = "| operator | shape | pass | TFLOP | GB |"
