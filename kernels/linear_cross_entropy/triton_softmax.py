"""Triton kernels that read the logits of a tile, or turn them into their gradients; see `loop` for the formulae."""

# pyright: reportInvalidTypeForm=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportCallIssue=false
import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """tanh from the one exponential that cannot overflow."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sum_up(
    logits_of,
    targets_of,
    maximum_of,
    total_of,
    own_of,
    stride,
    width,
    first,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token each: its running maximum and total of exp(logit - maximum) take up `width` more logits."""
    row = tl.program_id(0)
    logits = logits_of + row.to(tl.int64) * stride
    maximum, total = tl.load(maximum_of + row), tl.load(total_of + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(logits + column, mask=column < width, other=-float("inf"))
        if CAPPED:
            z = tl.where(column < width, softcap * _tanh(z / softcap), -float("inf"))
        largest = tl.maximum(maximum, tl.max(z, 0))
        shift = tl.where(tl.abs(largest) == float("inf"), 0.0, largest)  # inf - inf is no number
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(z - shift), 0)
        maximum = largest
    tl.store(maximum_of + row, maximum)
    tl.store(total_of + row, total)
    target = tl.load(targets_of + row) - first
    if (target >= 0) & (target < width):
        own = tl.load(logits + target)
        if CAPPED:
            own = softcap * _tanh(own / softcap)
        tl.store(own_of + row, own)


@triton.jit
def differentiate(
    logits_of,
    out_of,
    targets_of,
    lse_of,
    scale_of,
    dlosses_of,
    stride,
    width,
    first,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of one token's logits each: scale exp(z - lse) - dlosses [v = target], times the softcap's slope."""
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = row.to(tl.int64) * stride
    z = tl.load(logits_of + offset + column, mask=column < width, other=0.0)
    lse, scale, dloss = tl.load(lse_of + row), tl.load(scale_of + row), tl.load(dlosses_of + row)
    target = tl.load(targets_of + row) - first
    slope = 1.0
    if CAPPED:
        t = _tanh(z / softcap)
        e = tl.exp(-2.0 * tl.abs(z / softcap))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - t^2, without its loss of digits
        z = softcap * t
    dz = tl.exp(z - lse) * scale
    dz = slope * tl.where(column == target, dz - dloss, dz)
    tl.store(out_of + offset + column, dz.to(out_of.dtype.element_ty), mask=column < width)
