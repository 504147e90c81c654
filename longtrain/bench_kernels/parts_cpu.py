"""The parts of `longtrain bench kernels` on a CPU: the vectorised paths, beside PyTorch's own and over lengths."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain import kernels
from longtrain.bench_kernels.bench import NO_BAR, Bar, Bench, Comparison
from longtrain.bench_kernels.report import Row
from longtrain.bench_kernels.sides import Side, leaves, random
from longtrain.bench_kernels.timing import Call, Times, in_turn, peak_bytes

SHORT, LONG = 2048, 65_536
WITHIN, FASTER = 1.15, 20.0  # per-token time of LONG over that of SHORT; softmax's time over linear attention's
CHECKED = 512  # tokens whose results are compared with a wider dtype's


def linear(bench: Bench) -> None:
    """Fixed decay: the same time per token at every length, and far from a softmax's."""
    decay = -torch.linspace(0.001, 0.1, 4)
    cases: dict[int, Comparison] = {}
    inputs: dict[int, tuple[Tensor, ...]] = {}
    for tokens in (bench.tokens(SHORT), bench.tokens(LONG)):
        q, k, v, dout = inputs[tokens] = _tokens(bench, tokens, heads=4, width=64, count=4)
        case = f"fixed decay, B 1, T {tokens}, H 4, K 64, float32"
        sides = {"longtrain": Side(_linear, (*leaves(q, k, v), decay), dout)}
        cases[tokens] = Comparison("linear", case, sides, {"longtrain": NO_BAR})
        bench.check(cases[tokens], _linear_reference, tokens=CHECKED)
    short, long = cases
    # In turn, with as many tokens in a sample of either, so that whatever else the machine does falls on both alike.
    calls = long // short
    sides = {tokens: this.sides["longtrain"].both for tokens, this in cases.items()}
    turns = {"short": _repeated(sides[short], calls), "long": sides[long]}
    found = in_turn(turns, bench.device, repeats=bench.repeats)
    short_times = Times(tuple(seconds / calls for seconds in found["short"].samples))
    bench.rows(cases[short], {"longtrain": short_times}, "both", "s")
    q, k, v, dout = (x.detach().transpose(1, 2) for x in inputs[long])
    softmax = Side(_sdpa, leaves(q, k, v), dout)
    # A minute: once, with no warm-up but that of the processor, which is warm.
    slow = in_turn({"softmax (SDPA)": softmax.both}, bench.device, repeats=1, warm_up=0)
    with_bar = replace(cases[long], ours={"longtrain": Bar(least=FASTER)})
    bench.rows(with_bar, {"longtrain": found["long"]} | slow, "both", "s")
    ratio = min(found["long"].samples) / (long * min(short_times.samples) / short)
    row = Row("linear", f"T {long} over T {short}, best of each", "longtrain", "both", ratio, "x per token")
    bench.report.add(_with_bar(row, f"<= {WITHIN:g} x", ratio <= WITHIN))


def delta(bench: Bench) -> None:
    """The gated delta rule's time per token over lengths."""
    for tokens in (bench.tokens(SHORT), bench.tokens(SHORT * 8)):
        q, k, v, dout = _tokens(bench, tokens, heads=4, width=64, count=4)
        beta, decay = _gates(bench, tokens, heads=4)
        inputs = leaves(q, F.normalize(k, dim=-1), v, beta, decay)
        case = f"gated, B 1, T {tokens}, H 4, K 64, float32"
        this = Comparison("delta", case, {"longtrain": Side(_delta, inputs, dout)}, {"longtrain": NO_BAR})
        bench.check(this, _delta_reference, tokens=CHECKED)
        bench.time(this, directions=["both"])


def convolution(bench: Bench) -> None:
    """The causal convolution with SiLU beside PyTorch's grouped convolution."""
    tokens, width = bench.tokens(16_384), 512
    x, dout = (random(1, tokens, width, dtype=torch.float32, device=bench.device, seed=n) for n in range(2))
    weight = random(width, 4, dtype=torch.float32, device=bench.device, seed=2)
    sides = {
        "longtrain": Side(_convolve, leaves(x, weight), dout),
        "F.conv1d, F.silu": Side(_torch_convolve, leaves(x, weight), dout),
    }
    this = Comparison("conv", f"B 1, T {tokens}, D {width}, 4 taps, SiLU, float32", sides, {"longtrain": NO_BAR})
    bench.check(this, _convolve_reference, tokens=CHECKED)
    bench.agree(this)
    bench.time(this, directions=["both"])


def cross_entropy(bench: Bench) -> None:
    """Cross-entropy of a linear head beside PyTorch's on whole logits: time and memory."""
    tokens, width, vocabulary = bench.tokens(4096), 512, max(64, 32_768 // bench.shrink)
    generator = torch.Generator(bench.device).manual_seed(0)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator, device=bench.device)
    hidden = random(tokens, width, dtype=torch.float32, device=bench.device)
    weight = random(vocabulary, width, dtype=torch.float32, device=bench.device, seed=1) * width**-0.5
    dout = random(tokens, dtype=torch.float32, device=bench.device, seed=2)
    sides = {
        "longtrain": Side(_head(targets, "auto"), leaves(hidden, weight), dout),
        "whole logits": Side(_whole_logits(targets), leaves(hidden, weight), dout),
    }
    case = f"N {tokens}, D {width}, vocabulary {vocabulary}, float32"
    this = Comparison("cross-entropy", case, sides, {"longtrain": NO_BAR})
    bench.check(this, _head(targets, "reference"), tokens=tokens)
    bench.agree(this)
    bench.time(this, directions=["both"])
    peaks = {name: peak_bytes(side.both, bench.device) for name, side in sides.items()}
    for name, peak in peaks.items():
        ratio = peaks["whole logits"] / peak if name == "longtrain" else None
        bench.report.add(Row("cross-entropy", case, name, "peak memory", peak / 2**20, "MiB", ratio=ratio))


PARTS: dict[str, Callable[[Bench], None]] = {
    "linear": linear,
    "delta": delta,
    "conv": convolution,
    "cross-entropy": cross_entropy,
}


def _repeated(call: Call, times: int) -> Call:
    def repeat() -> None:
        for _ in range(times):
            call()

    return repeat


def _with_bar(row: Row, bar: str, met: bool) -> Row:
    return replace(row, bar=bar, met=met)


def _tokens(bench: Bench, tokens: int, *, heads: int, width: int, count: int) -> tuple[Tensor, ...]:
    shape = (1, tokens, heads, width)
    return tuple(random(*shape, dtype=torch.float32, device=bench.device, seed=n) for n in range(count))


def _gates(bench: Bench, tokens: int, *, heads: int) -> tuple[Tensor, Tensor]:
    """beta between 0 and 1, and log-decays around -0.05."""
    one, other = (random(1, tokens, heads, dtype=torch.float32, device=bench.device, seed=n) for n in (10, 11))
    return one.sigmoid(), -0.05 * other.abs()


def _linear(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return kernels.linear_attention(q, k, v, decay)[0]


def _linear_reference(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    return kernels.linear_attention(q, k, v, decay, backend="reference")[0]


def _delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    return kernels.gated_delta_rule(q, k, v, beta, decay)[0]


def _delta_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    return kernels.gated_delta_rule(q, k, v, beta, decay, backend="reference")[0]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.causal_conv1d(x, weight, activation="silu")


def _convolve_reference(x: Tensor, weight: Tensor) -> Tensor:
    return kernels.causal_conv1d(x, weight, activation="silu", backend="reference")


def _torch_convolve(x: Tensor, weight: Tensor) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=weight.shape[0])).transpose(1, 2)


def _head(targets: Tensor, backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: kernels.linear_cross_entropy(
        hidden, weight, targets, reduction="none", backend=backend
    )


def _whole_logits(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
