"""What the kernels of softmax attention share: who sees whom in a block, scores, and containment of NaN and inf.

A float32 product has no tensor cores: each thread holds whole rows of both factors in registers. The factor that stays
the same in a loop would be kept there, a width of registers for each of its rows, so such loops load it anew (RELOAD).
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def ends_of(rows, size, first_ptr, stop_ptr, first_shift, stop_shift, others, VECTORS: tl.constexpr):
    """The interval [first, stop) of `others` that each of `rows` sees (queries their keys, or keys their queries).

    From int32 vectors, or, on a plain diagonal, first = row + first_shift and stop = row + stop_shift, both clipped to
    0 ... others. Rows past `size` get the last row's.
    """
    rows = tl.minimum(rows, size - 1)
    if VECTORS:
        return tl.load(first_ptr + rows), tl.load(stop_ptr + rows)
    first = tl.minimum(tl.maximum(rows + first_shift, 0), others)
    stop = tl.minimum(tl.maximum(rows + stop_shift, 0), others)
    return first, stop


@triton.jit
def stretches(first_a, stop_a, first_b, stop_b, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """What a block of rows sees as three stretches: masked, seen by all of its rows, masked.

    The stretch in the middle consists of whole blocks, the masked ones of smaller blocks of size EDGE: masks, and the
    search for NaN, take registers, and less is computed in vain.

    first_a, stop_a: ends of the block's first row; first_b, stop_b: of its last. Ends never decrease along the rows:
    [first_a, stop_b) is what any row sees and [first_b, stop_a) what all do. Returns the number of blocks in each.
    """
    head = tl.cdiv(tl.maximum(tl.minimum(first_b, stop_b) - first_a, 0), EDGE)
    middle = tl.maximum(stop_a - (first_a + head * EDGE), 0) // BLOCK
    tail = tl.cdiv(tl.maximum(stop_b - (first_a + head * EDGE + middle * BLOCK), 0), EDGE)
    return head, middle, tail


@triton.jit
def block_start(index, first_a, head, middle, BLOCK: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr):
    """Where a block of `stretches` begins: the index counts those in the middle, or, MASKED, those of both ends."""
    if MASKED:
        return first_a + index * EDGE + tl.where(index < head, 0, middle * BLOCK)
    return first_a + head * EDGE + index * BLOCK


@triton.jit
def load_rows(pointers, rows_inside, columns, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """A block of vectors; 0 past its width and, where rows are CHECKED, outside."""
    if CHECKED:
        if PADDED != WIDTH:
            return tl.load(pointers, mask=rows_inside[:, None] & (columns < WIDTH)[None, :], other=0.0)
        return tl.load(pointers, mask=rows_inside[:, None], other=0.0)
    if PADDED != WIDTH:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_numbers(pointers, inside, CHECKED: tl.constexpr):
    """A number for each row; 0 where rows are CHECKED and it lies outside."""
    if CHECKED:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_block(
    blocks,
    batch,
    head,
    start,
    pointers,
    rows_inside,
    columns,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,
    CHECKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """`load_rows`, or, where rows need no check and there are DESCRIPTORS, by the tensor memory accelerator.

    blocks: the descriptor of [B, H, T, width] in blocks of [1, 1, ROWS, PADDED]. One thread asks for the whole block,
    so that no thread holds its addresses.
    """
    if DESCRIPTORS:
        if not CHECKED:
            return tl.reshape(blocks.load([batch, head, start, 0]), [ROWS, PADDED])
    return load_rows(pointers, rows_inside, columns, WIDTH, PADDED, CHECKED)


@triton.jit
def finite_part(x):
    """x with 0 for each NaN and inf, and which of its vectors held one (1) or none (0)."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, tl.zeros_like(x)), tl.max(tl.where(finite, 0, 1), axis=1)


@triton.jit
def capped_tanh(x):
    """tanh(x) = (1 - e) / (1 + e) with e = exp(-2 |x|), which never overflows; its series where 1 - e would cancel."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - e) / (1.0 + e)
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
    return tl.where(tl.abs(x) < 0.08, series, tl.where(x < 0, -size, size))


@triton.jit
def is_finite(base, row, stride, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Whether a block of vectors that an earlier kernel wrote is finite."""
    columns = tl.arange(0, PADDED)
    block = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    numbers = tl.load(block, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0).to(tl.float32)
    return tl.sum(tl.sum(tl.where(tl.abs(numbers) < float("inf"), 0, 1), axis=1), axis=0) == 0


@triton.jit
def rows_again(begin, size, BLOCK: tl.constexpr):
    """The block's rows, and which are inside, as numbers that the compiler cannot tell to be the same as before.

    Otherwise it would keep them, and the pointers to what is read before the loops and written after them, in registers
    meanwhile.
    """
    row = begin + tl.minimum(size, 0) + tl.arange(0, BLOCK)
    return row, row < size


@triton.jit
def write(base, row, stride, inside, x, WIDTH: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr):
    """Write a block of vectors, or ADD it to what is there."""
    columns = tl.arange(0, PADDED)
    block = base + row.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    if ADD:
        x += tl.load(block, mask=mask, other=0.0)
    tl.store(block, x.to(base.dtype.element_ty), mask=mask)
