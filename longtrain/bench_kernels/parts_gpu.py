"""The parts of `longtrain bench kernels` on a GPU: the bars of the kernels, each beside the best rival at hand."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain import kernels
from longtrain.bench_kernels import rivals, roofline
from longtrain.bench_kernels.bench import NO_BAR, Bar, Bench, Comparison, with_bars
from longtrain.bench_kernels.parts_cpu import convolution
from longtrain.bench_kernels.report import Row
from longtrain.bench_kernels.sides import Side, check, leaves, random
from longtrain.bench_kernels.timing import in_turn, peak_bytes

HEADS, GROUPS, WIDTH = 32, 8, 128
LENGTHS = (8192, 32_768, 131_072)  # causal softmax
PACKED = 32_768
LINEAR = 131_072
GROWING = (8192, 65_536, 524_288, 1_048_576)  # tokens/s must stay the same
CHECKED = 1024  # tokens whose results are compared with a wider dtype's
LIVES = 16_384  # tokens after which the slowest of the fixed decays below has left 1e-7
BFLOAT16 = torch.bfloat16


def softmax(bench: Bench) -> None:
    """Causal softmax beside PyTorch's kernels and FlexAttention."""
    for length in LENGTHS:
        tokens = bench.tokens(length)
        q, k, v, dout = _attention_inputs(bench, tokens)
        sides = {"auto": Side(_softmax("auto"), leaves(q, k, v), dout)}
        bars = {"auto": Bar(least=1.0)}
        if bench.device.type == "cuda":
            sides["triton"], bars["triton"] = Side(_softmax("triton"), leaves(q, k, v), dout), Bar(least=0.85)
        others = _heads_second(q, k, v, dout)
        found: dict[str, rivals.Operator] = {name: rivals.sdpa(backend) for name, backend in rivals.SDPA.items()}
        if bench.device.type == "cuda":
            found["FlexAttention"] = rivals.Flex(tokens, bench.device)
        for name, operator in found.items():
            sides |= bench.rival(name, partial(Side, _heads_first(operator), leaves(q, k, v), dout))
        case = f"causal, B 1, T {tokens}, H {HEADS}, G {GROUPS}, K {WIDTH}, bf16"
        expected = bench.expected(roofline.softmax(roofline.causal(tokens), "causal", **_SHAPE))
        this = Comparison("softmax", case, sides, bars, expected)
        bench.check(this, _softmax("reference"), tokens=CHECKED)
        bench.agree(this)
        # Rivals are timed in the order of dimensions that they like best.
        for name in found.keys() & sides.keys():
            sides[name] = Side(found[name], leaves(*others[:3]), others[3])
        bench.time(this, directions=["forward", "backward"], repeats=min(bench.repeats, 3 if length > PACKED else 9))


def packed(bench: Bench) -> None:
    """Packed documents and windows beside FlexAttention, which makes its mask anew for every batch."""
    tokens = bench.tokens(PACKED)
    lengths = [tokens // 2, tokens // 4, tokens // 8] + [tokens // 64] * 8
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(bench.device)
    window = tokens // 8 - 1
    kinds = {
        f"{len(lengths)} documents": ({"cu_seqlens": boundaries}, {"documents": document}),
        f"window of {window + 1}": ({"window": (window, 0)}, {"window": window}),
    }
    for kind, (mine, theirs) in kinds.items():
        q, k, v, dout = _attention_inputs(bench, tokens)
        sides = {"auto": Side(_softmax("auto", **mine), leaves(q, k, v), dout)}
        flex = rivals.Flex(tokens, bench.device, masks_each_time=True, **theirs)
        if bench.device.type == "cuda":
            sides |= bench.rival("FlexAttention", partial(Side, _heads_first(flex), leaves(q, k, v), dout))
        case = f"{kind}, B 1, T {tokens}, H {HEADS}, G {GROUPS}, K {WIDTH}, bf16"
        intervals = (
            roofline.causal(tokens, documents=lengths)
            if "cu_seqlens" in mine
            else roofline.causal(tokens, window=window)
        )
        expected = bench.expected(roofline.softmax(intervals, kind, **_SHAPE))
        this = Comparison("packed", case, sides, {"auto": Bar(least=1.5)}, expected)
        bench.agree(this, also={"torch path": Side(_softmax("torch", **mine), leaves(q, k, v), dout)})
        if "FlexAttention" in sides:
            others = _heads_second(q, k, v, dout)
            sides["FlexAttention"] = Side(flex, leaves(*others[:3]), others[3])
        bench.time(this, directions=["both"])


def ring_step(bench: Bench) -> None:
    """A ring's step, which merges into float32 results in place, beside the plain kernel."""
    if bench.device.type != "cuda":
        return
    from longtrain.kernels.softmax_attention import triton_impl

    tokens = bench.tokens(PACKED)
    q, k, v, _ = _attention_inputs(bench, tokens)
    intervals = roofline.causal(tokens)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    plain, running = torch.empty_like(q), torch.zeros_like(q, dtype=torch.float32)
    lse_of_plain = torch.empty_like(lse)

    def step(out: Tensor, lse: Tensor, *, accumulate: bool) -> Callable[[], object]:
        options = {"scale": WIDTH**-0.5, "softcap": None, "accumulate": accumulate}
        return lambda: triton_impl.forward(q, k, v, intervals, out=out, lse=lse, **options)

    calls = {
        "accumulating": step(running, lse, accumulate=True),
        "plain kernel": step(plain, lse_of_plain, accumulate=False),
    }
    this = Comparison("ring step", f"causal, T {tokens}, H {HEADS}, G {GROUPS}, K {WIDTH}, bf16", {}, {})
    for call in calls.values():
        call()
    # From nothing a step comes to the plain result; the same keys again leave out as it is and double the sums.
    results = running.to(plain.dtype), lse
    error = check(f"ring step, {this.case}", results, (plain, lse_of_plain), dtype=plain.dtype)
    this.errors["accumulating"] = error
    times = in_turn(calls, bench.device, repeats=2 * bench.repeats)
    this.ours = {"accumulating": Bar(least=0.97)}
    bench.rows(this, times, "forward")


def linear(bench: Bench) -> None:
    """Linear attention with a fixed decay and with decays per channel, beside flash-linear-attention."""
    tokens = bench.tokens(LINEAR)
    q, k, v, dout = (random(1, tokens, HEADS, WIDTH, dtype=BFLOAT16, device=bench.device, seed=n) for n in range(4))
    forward, backward = (bench.on("H200", Bar(most=most)) for most in (1.5e-3, 3.5e-3))
    fixed = -torch.linspace(0.001, 0.1, HEADS, device=bench.device)
    bars = {"forward": forward, "backward": backward}
    _linear_case(bench, "head", "fixed decay", (*leaves(q, k, v), fixed), dout, rivals.fla_head, Bar(least=2.0), bars)
    gates = F.logsigmoid(random(1, tokens, HEADS, WIDTH, dtype=BFLOAT16, device=bench.device, seed=4)) / 16
    inputs = leaves(q, k, v, gates)
    _linear_case(bench, "channel", "decay per channel", inputs, dout, rivals.fla_channel, Bar(least=1.3), {})


def _linear_case(
    bench: Bench,
    decay: str,
    name: str,
    inputs: tuple[Tensor, ...],
    dout: Tensor,
    rival: rivals.Operator,
    bar: Bar,
    in_seconds: dict[str, Bar],
) -> None:
    tokens = dout.shape[1]
    sides = {"longtrain": Side(_linear, inputs, dout)}
    sides |= bench.rival(rivals.fla_name(), partial(Side, rival, inputs, dout))
    shape = {"batch": 1, "tokens": tokens, "heads": HEADS, "key_width": WIDTH, "value_width": WIDTH}
    case = f"{name}, B 1, T {tokens}, H {HEADS}, K {WIDTH}, bf16"
    expected = bench.expected(roofline.linear(**shape, decay=decay))
    this = Comparison("linear", case, sides, {"longtrain": bar}, expected)
    bench.check(this, _linear_torch, tokens=CHECKED)
    bench.agree(this, also={"torch path": Side(_linear_torch, inputs, dout)})
    for direction in ("forward", "backward"):
        bench.time(this, directions=[direction])
        if (limit := in_seconds.get(direction, NO_BAR)) != NO_BAR:
            alone = with_bars(Comparison("linear", case, {"longtrain": sides["longtrain"]}, {}), {"longtrain": limit})
            bench.time(alone, directions=[direction])


def lengths(bench: Bench) -> None:
    """Tokens per second of a fixed decay over lengths."""
    rates = {}
    decay = -torch.linspace(0.001, 0.1, HEADS, device=bench.device)
    for length in GROWING:
        tokens = bench.tokens(length)
        q, k, v = (random(1, tokens, HEADS, WIDTH, dtype=BFLOAT16, device=bench.device, seed=n) for n in range(3))
        side = Side(_linear, (q, k, v, decay))
        # What came more than LIVES tokens before has been forgotten: so the end of any sequence is that of a short one.
        end, lives = side.forward()[:, -CHECKED:], bench.tokens(LIVES)
        last = slice(-lives - CHECKED, None)
        alone = _linear(q[:, last], k[:, last], v[:, last], decay)[:, -CHECKED:]
        check(f"lengths, T {tokens}", (end,), (alone,), dtype=BFLOAT16)
        del end, alone
        times = in_turn({"longtrain": side.forward}, bench.device, repeats=bench.repeats)
        rates[tokens] = tokens / times["longtrain"].median
        del q, k, v, side
    first = rates[min(rates)]
    for tokens, rate in rates.items():
        ratio = rate / first
        case = f"fixed decay, B 1, T {tokens}, H {HEADS}, K {WIDTH}, bf16"
        row = Row(
            "lengths", case, "longtrain", "forward", rate / 1e6, "million tokens/s", ratio=ratio, bar="0.95 to 1.05 x"
        )
        bench.report.add(_met(row, 0.95 <= ratio <= 1.05))


def delta(bench: Bench) -> None:
    """The gated delta rule beside flash-linear-attention."""
    tokens = bench.tokens(LINEAR // 2)
    q, k, v, dout = (random(1, tokens, HEADS, WIDTH, dtype=BFLOAT16, device=bench.device, seed=n) for n in range(4))
    beta = random(1, tokens, HEADS, dtype=BFLOAT16, device=bench.device, seed=5).sigmoid()
    decay = F.logsigmoid(random(1, tokens, HEADS, dtype=torch.float32, device=bench.device, seed=6)) / 16
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    inputs = leaves(q, k, v, beta, decay)
    sides = {"longtrain": Side(_delta, inputs, dout)}
    sides |= bench.rival(rivals.fla_name(), partial(Side, rivals.fla_delta, inputs, dout))
    shape = {"batch": 1, "tokens": tokens, "heads": HEADS, "key_width": WIDTH, "value_width": WIDTH}
    case = f"gated, B 1, T {tokens}, H {HEADS}, K {WIDTH}, bf16"
    expected = bench.expected(roofline.delta_rule(**shape))
    this = Comparison("delta", case, sides, {"longtrain": Bar(least=1.3)}, expected)
    bench.check(this, _delta_torch, tokens=CHECKED)
    bench.agree(this, also={"torch path": Side(_delta_torch, inputs, dout)})
    bench.time(this, directions=["forward", "backward"])


def slots(bench: Bench) -> None:
    """Gated slot attention; no rival takes its parts apart like this."""
    tokens, count = bench.tokens(LINEAR // 2), 64
    q, k, v, dout = (random(1, tokens, HEADS, WIDTH, dtype=BFLOAT16, device=bench.device, seed=n) for n in range(4))
    decay = F.logsigmoid(random(1, tokens, HEADS, count, dtype=BFLOAT16, device=bench.device, seed=5)) / 16
    inputs = leaves(q, k, v, 1 - decay.exp(), decay)
    case = f"B 1, T {tokens}, H {HEADS}, K {WIDTH}, M {count}, bf16"
    works = roofline.slot_attention(batch=1, tokens=tokens, heads=HEADS, width=WIDTH, slots=count)
    sides = {"longtrain": Side(_slots("auto"), inputs, dout)}
    this = Comparison("slots", case, sides, {"longtrain": NO_BAR}, bench.expected(works))
    bench.check(this, _slots("torch"), tokens=CHECKED)
    bench.agree(this, also={"torch path": Side(_slots("torch"), inputs, dout)})
    bench.time(this, directions=["forward", "backward"])


def cross_entropy(bench: Bench) -> None:
    """Cross-entropy of a linear head beside its matrix products alone, and the memory that it takes."""
    tokens, width, vocabulary = bench.tokens(32_768), 4096 // min(bench.shrink, 64), bench.tokens(131_072)
    hidden = random(tokens, width, dtype=BFLOAT16, device=bench.device)
    weight = random(vocabulary, width, dtype=BFLOAT16, device=bench.device, seed=1) * width**-0.5
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device)
    dout = random(tokens, dtype=torch.float32, device=bench.device, seed=2)
    side = Side(_head(targets, "auto"), leaves(hidden, weight), dout)
    case = f"N {tokens}, D {width}, vocabulary {vocabulary}, bf16"
    some = slice(0, CHECKED)
    small = Side(_head(targets[some], "auto"), leaves(hidden[some], weight), dout[some])
    expected = bench.expected(roofline.cross_entropy(tokens=tokens, width=width, vocabulary=vocabulary))
    this = Comparison("cross-entropy", case, {"longtrain": small}, {"longtrain": Bar(least=1 / 1.15)}, expected)
    bench.check(this, _head(targets[some], "reference"), tokens=CHECKED)
    torch_path = Side(_head(targets, "torch"), leaves(hidden, weight), dout)
    bench.agree(replace(this, sides={"longtrain": side}), also={"torch path": torch_path})
    # The rate of a product as large as a card likes, in this dtype; all four have as many operations.
    rows, columns = hidden[:8192], weight[:8192]
    out = torch.empty(rows.shape[0], columns.shape[0], dtype=BFLOAT16, device=bench.device)

    def product() -> None:
        torch.mm(rows, columns.t(), out=out)

    def tiles() -> None:
        for _ in range(4 * round(tokens * vocabulary / out.numel())):
            product()

    times = in_turn({"longtrain": side.both, "4 matrix products": tiles}, bench.device, repeats=bench.repeats)
    bench.rows(this, times, "both")
    results = 2 * (hidden.numel() + weight.numel())
    extra = peak_bytes(side.both, bench.device) - results
    row = Row("cross-entropy", case, "longtrain", "peak memory", extra / 1e9, "GB beyond gradients", bar="<= 1.5 GB")
    bench.report.add(_met(row, extra <= 1.5e9))


PARTS: dict[str, Callable[[Bench], None]] = {
    "softmax": softmax,
    "packed": packed,
    "ring-step": ring_step,
    "linear": linear,
    "lengths": lengths,
    "delta": delta,
    "slots": slots,
    "conv": convolution,
    "cross-entropy": cross_entropy,
}
_SHAPE = {"batch": 1, "heads": HEADS, "kv_heads": GROUPS, "key_width": WIDTH, "value_width": WIDTH}


def _met(row: Row, met: bool) -> Row:
    return replace(row, met=met)


def _attention_inputs(bench: Bench, tokens: int) -> tuple[Tensor, ...]:
    """q, k, v, dout."""
    shapes = ((heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS, HEADS))
    return tuple(
        random(1, tokens, *shape, dtype=BFLOAT16, device=bench.device, seed=n) for n, shape in enumerate(shapes)
    )


def _heads_second(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _heads_first(operator: rivals.Operator) -> rivals.Operator:
    """An operator on [B, H, T, K] for [B, T, H, K]."""
    return lambda *inputs: operator(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)


def _softmax(backend: str, **options: Any) -> rivals.Operator:
    return lambda q, k, v: kernels.softmax_attention(q, k, v, backend=backend, **options)[0]


def _linear(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return kernels.linear_attention(q, k, v, decay)[0]


def _linear_torch(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return kernels.linear_attention(q, k, v, decay, backend="torch")[0]


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    return kernels.gated_delta_rule(q, k, v, beta, decay)[0]


def _delta_torch(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    return kernels.gated_delta_rule(q, k, v, beta, decay, backend="torch")[0]


def _slots(backend: str) -> rivals.Operator:
    return lambda q, k, v, slot, decay: kernels.gated_slot_attention(q, k, v, slot, decay, backend=backend)[0]


def _head(targets: Tensor, backend: str) -> rivals.Operator:
    return lambda hidden, weight: kernels.linear_cross_entropy(
        hidden, weight, targets, reduction="none", backend=backend
    )
