# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
"""Triton kernels of the gated delta rule: what a chunk is before any state is known.

    A_ij = k_i . (k_j exp(between_ij)), j < i       P_ij = q_i . (k_j exp(between_ij)), j <= i
    inverse = (I + diag(beta) A)^{-1},  U0 = inverse diag(beta) V,  W = inverse diag(beta) (K exp(prefix))

with prefix, suffix, total and between the sums of log-decays of `tiles.py`. Each is summed up from its own terms, never
as the difference of two others: so no exponent is above 0, log-decays of -inf work, and a strong decay costs its
neighbours no precision. GATE is 0 without decays, 1 for one per head and 2 for one per channel.

All tensors of tokens are contiguous, [rows, heads, width] with rows = B * T; q has GQ and k GK heads, all else H. A
chunk is `count` consecutive rows from `row`; its C x C matrices lie in its own rows, [rows, H, C]. Rows behind `count`
are read as zeros and not written.

NaN and inf. Tokens whose k, beta or log-decay is not finite are marked by NaN in `rates`, which otherwise is beta. They
are taken out of A, whose entries (i, j) with such a token from j to i are 0, so that the inverse is finite, and right
between tokens that no such token divides. As a masked number is 0, and 0 * NaN is NaN, every later product over the
tokens of a chunk has what is not finite taken out of its operand, and gives NaN from the first such token on
(`reaches_on`) or, in backward, up to the last one (`reaches_back`): there whatever depends on it lies.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_forward import finite


@triton.jit
def chunk_rows(chunks, chunk, C: tl.constexpr):
    """The rows of a chunk, int64 [C], and which of them it has."""
    i = tl.arange(0, C)
    row = tl.load(chunks + 2 * chunk).to(tl.int64)
    return row + i, i < tl.load(chunks + 2 * chunk + 1)


@triton.jit
def load_block(x, rows, live, columns, width):
    """x[rows, columns], rows given as offsets of their first numbers; 0 where there is none."""
    return tl.load(x + rows[:, None] + columns[None, :], mask=live[:, None] & (columns < width)[None, :], other=0.0)


@triton.jit
def store_block(x, rows, live, columns, width, value):
    mask = live[:, None] & (columns < width)[None, :]
    tl.store(x + rows[:, None] + columns[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def reaches_on(x, C: tl.constexpr):
    """Which rows of x [C, N] come at or after the first that is not finite, [C]."""
    i = tl.arange(0, C)
    broken = tl.sum(x.to(tl.float32) * 0.0, 1) != 0  # 0, or NaN
    return i >= tl.min(tl.where(broken, i, C), 0)


@triton.jit
def reaches_back(x, marks, C: tl.constexpr):
    """Which rows of x [C, N] come at or before the last where x, or marks [C], is not finite, [C]."""
    i = tl.arange(0, C)
    broken = tl.sum(x.to(tl.float32) * 0.0, 1) + marks * 0.0 != 0
    return i <= tl.max(tl.where(broken, i, -1), 0)


@triton.jit
def exp_between(g, C: tl.constexpr):
    """exp(between_ij) for g [C] in the lower triangle; 1 above it."""
    i = tl.arange(0, C)
    return tl.exp(tl.cumsum(tl.where(i[:, None] > i[None, :], g[:, None], 0.0), 0))


@triton.jit
def has_successor(chunks, chunk, C: tl.constexpr):
    """Which rows of a chunk are followed by one more of it, [C]."""
    return tl.arange(0, C) + 1 < tl.load(chunks + 2 * chunk + 1)


@triton.jit
def meet(half, C: tl.constexpr):
    """[C, C]: whether i lies in the second and j in the first half of the same block of 2 * half tokens."""
    i = tl.arange(0, C)
    same = (i // (2 * half))[:, None] == (i // (2 * half))[None, :]
    return same & (i // half % 2 == 1)[:, None] & (i // half % 2 == 0)[None, :]


@triton.jit
def join_halves(rise, fall, half, C: tl.constexpr, BK: tl.constexpr):
    """The sums of log-decays from the start of each half to a token and from behind it to the end, [C, BK], become
    those of the blocks of 2 * half tokens: a second half comes after the whole first one, and the other way round.

    From rise = g, fall = 0 for halves of one token, up to the prefix and the suffix of the chunk.
    """
    i = tl.arange(0, C)
    second = i // half % 2 == 1
    last_of_other = i // (2 * half) * (2 * half) + tl.where(second, half - 1, 2 * half - 1)
    other = tl.gather(rise, tl.broadcast_to(last_of_other[:, None], (C, BK)), 0)
    return rise + tl.where(second[:, None], other, 0.0), fall + tl.where(second[:, None], 0.0, other)


@triton.jit
def pairs_kernel(
    q,
    k,
    beta,
    log_decay,
    chunks,
    rates,  # [rows, H]: beta, NaN where a token's k, beta or log-decay is not finite (a log-decay may be -inf)
    a,
    p,
    readers,  # Q exp(prefix), K exp(prefix) and K exp(suffix): for GATE 2, otherwise None
    erasers,
    written,
    from_start,  # exp(prefix) and exp(suffix) [rows, H]: for GATE 1, otherwise None
    to_end,
    through,  # exp(total), [chunks, H] for GATE 1, [chunks, H, K] for GATE 2
    H: tl.constexpr,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(C)
    GATE: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rates, A, P, and the factors of the decays. Grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    i = tl.arange(0, C)
    a_sum = tl.zeros((C, C), tl.float32)
    p_sum = tl.zeros((C, C), tl.float32)
    marks = tl.load(beta + own, mask=live, other=0.0) * 0.0  # 0, or NaN
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        q_block = load_block(q, (rows * GQ + head // (H // GQ)) * K, live, columns, K)
        k_block = load_block(k, (rows * GK + head // (H // GK)) * K, live, columns, K)
        if GATE == 2:
            g = load_block(log_decay, own * K, live, columns, K)
            q_wide, k_wide = q_block.to(tl.float32), k_block.to(tl.float32)
            marks += tl.sum(k_wide * 0.0 + tl.where(g != g, g, 0.0), 1)
            p_sum += tl.where(i[:, None] == i[None, :], tl.sum(q_wide * k_wide, 1)[:, None], 0.0)
            rise, fall = g, tl.zeros((C, BK), tl.float32)
            for level in range(0, LEVELS):
                half = 1 << level
                met = meet(half, C)
                from_first = tl.trans((k_wide * tl.exp(fall)).to(k.dtype.element_ty))
                factor = tl.exp(rise)
                by_key, by_query = (k_wide * factor).to(k.dtype.element_ty), (q_wide * factor).to(q.dtype.element_ty)
                a_sum += tl.where(met, tl.dot(by_key, from_first, input_precision=PRECISION), 0.0)
                p_sum += tl.where(met, tl.dot(by_query, from_first, input_precision=PRECISION), 0.0)
                rise, fall = join_halves(rise, fall, half, C, BK)
            prefix, suffix = tl.exp(rise), tl.exp(fall)
            store_block(readers, own * K, live, columns, K, q_wide * prefix)
            store_block(erasers, own * K, live, columns, K, k_wide * prefix)
            store_block(written, own * K, live, columns, K, k_wide * suffix)
            total = tl.exp(tl.sum(g, 0))
            tl.store(through + (chunk.to(tl.int64) * H + head) * K + columns, total, mask=columns < K)
        else:
            a_sum = tl.dot(k_block, tl.trans(k_block), a_sum, input_precision=PRECISION)
            p_sum = tl.dot(q_block, tl.trans(k_block), p_sum, input_precision=PRECISION)
    if GATE != 2:  # |k_i|^2 is finite only where k_i is
        marks += tl.sum(tl.where(i[:, None] == i[None, :], a_sum, 0.0), 1) * 0.0
    if GATE == 1:
        g = tl.load(log_decay + own, mask=live, other=0.0)
        marks += tl.where(g != g, g, 0.0)
        successor = tl.load(log_decay + own + H, mask=has_successor(chunks, chunk, C), other=0.0)
        between = exp_between(g, C)
        a_sum, p_sum = a_sum * between, p_sum * between
        tl.store(from_start + own, tl.exp(tl.cumsum(g, 0)), mask=live)
        tl.store(to_end + own, tl.exp(tl.cumsum(successor, 0, reverse=True)), mask=live)
        tl.store(through + chunk * H + head, tl.exp(tl.sum(g, 0)))
    bad = marks != 0
    count = tl.cumsum(bad.to(tl.int32), 0)
    together = count[:, None] == (count - bad.to(tl.int32))[None, :]  # no marked token from j to i
    a_sum = tl.where((i[:, None] > i[None, :]) & together, a_sum, 0.0)
    tl.store(rates + own, tl.where(bad, float("nan"), tl.load(beta + own, mask=live, other=0.0)), mask=live)
    if GATE != 2:
        p_sum = tl.where(i[:, None] >= i[None, :], p_sum, 0.0)
    store_block(a, own * C, live, i, C, a_sum)
    store_block(p, own * C, live, i, C, p_sum)


@triton.jit
def invert_kernel(a, rates, chunks, inverse, H: tl.constexpr, C: tl.constexpr):
    """(I + diag(beta) A)^{-1}, all in float32 but for the result; finite. Grid (chunks, H).

    Blocks of 16 x 16: those on the diagonal by forward substitution, all at once; then, below them, as products

        X_ij = -X_ii (L_ij X_jj + ... + L_{i,i-1} X_{i-1,j})         L = diag(beta) A, j < i
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    BLOCKS: tl.constexpr = C // 16
    first, count = tl.load(chunks + 2 * chunk).to(tl.int64), tl.load(chunks + 2 * chunk + 1)
    b, r = tl.arange(0, BLOCKS), tl.arange(0, 16)
    within = (b * 16)[:, None] + r[None, :]  # [BLOCKS, 16]
    own = (first + within) * H + head
    there = within < count
    at = a + (own * C)[:, :, None] + within[:, None, :]
    diagonal = tl.load(at, mask=there[:, :, None], other=0.0)
    diagonal *= finite(tl.load(rates + own, mask=there, other=0.0))[:, :, None]
    x = tl.zeros((BLOCKS, 16, 16), tl.float32) + (r[:, None] == r[None, :])[None, :, :].to(tl.float32)
    for i in range(1, 16):
        here = (r == i)[None, :, None]
        factors = tl.sum(tl.where(here, diagonal, 0.0), 1)  # row i of each block
        x = tl.where(here, x - tl.sum(factors[:, :, None] * x, 1)[:, None, :], x)
    at = inverse + (own * C)[:, :, None] + within[:, None, :]
    tl.store(at, x.to(inverse.dtype.element_ty), mask=there[:, :, None])
    x0 = _pick(x, 0, BLOCKS)
    if C >= 32:
        x1 = _pick(x, 1, BLOCKS)
        x10 = _below(x1, _product(a, rates, first, count, 1, 0, x0, head, H, C))
        _put(inverse, first, count, 1, 0, x10, head, H, C)
    if C >= 64:
        x2, x3 = _pick(x, 2, BLOCKS), _pick(x, 3, BLOCKS)
        x21 = _below(x2, _product(a, rates, first, count, 2, 1, x1, head, H, C))
        x32 = _below(x3, _product(a, rates, first, count, 3, 2, x2, head, H, C))
        sum20 = _product(a, rates, first, count, 2, 0, x0, head, H, C)
        x20 = _below(x2, sum20 + _product(a, rates, first, count, 2, 1, x10, head, H, C))
        sum31 = _product(a, rates, first, count, 3, 1, x1, head, H, C)
        x31 = _below(x3, sum31 + _product(a, rates, first, count, 3, 2, x21, head, H, C))
        sum30 = _product(a, rates, first, count, 3, 0, x0, head, H, C)
        sum30 += _product(a, rates, first, count, 3, 1, x10, head, H, C)
        x30 = _below(x3, sum30 + _product(a, rates, first, count, 3, 2, x20, head, H, C))
        _put(inverse, first, count, 2, 1, x21, head, H, C)
        _put(inverse, first, count, 3, 2, x32, head, H, C)
        _put(inverse, first, count, 2, 0, x20, head, H, C)
        _put(inverse, first, count, 3, 1, x31, head, H, C)
        _put(inverse, first, count, 3, 0, x30, head, H, C)


@triton.jit
def _pick(x, block: tl.constexpr, BLOCKS: tl.constexpr):
    """x[block] of [BLOCKS, 16, 16]."""
    return tl.sum(tl.where((tl.arange(0, BLOCKS) == block)[:, None, None], x, 0.0), 0)


@triton.jit
def _product(a, rates, first, count, i: tl.constexpr, j: tl.constexpr, x, head, H: tl.constexpr, C: tl.constexpr):
    """L_ij x."""
    r = tl.arange(0, 16)
    live = 16 * i + r < count
    own = (first + 16 * i + r) * H + head
    factors = finite(tl.load(rates + own, mask=live, other=0.0))
    block = load_block(a, own * C, live, 16 * j + r, C) * factors[:, None]
    return tl.dot(block, x, input_precision="ieee")


@triton.jit
def _below(x, total):
    return -tl.dot(x, total, input_precision="ieee")


@triton.jit
def _put(inverse, first, count, i: tl.constexpr, j: tl.constexpr, x, head, H: tl.constexpr, C: tl.constexpr):
    """Block (i, j), and zeros in block (j, i)."""
    r = tl.arange(0, 16)
    store_block(inverse, ((first + 16 * i + r) * H + head) * C, 16 * i + r < count, 16 * j + r, C, x)
    zeros = tl.zeros((16, 16), tl.float32)
    store_block(inverse, ((first + 16 * j + r) * H + head) * C, 16 * j + r < count, 16 * i + r, C, zeros)


@triton.jit
def apply_kernel(
    k,  # for GATE 2 None: K exp(prefix) lies where W goes
    v,
    rates,
    from_start,  # None unless GATE 1
    inverse,
    chunks,
    w,
    u,
    H: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """W and U0. Grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    solver = load_block(inverse, own * C, live, tl.arange(0, C), C)
    factors = tl.load(rates + own, mask=live, other=0.0)
    i = tl.arange(0, C)
    marked = tl.min(tl.where(factors == factors, C, i), 0)
    whole = i < marked
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        right = tl.where(whole[:, None], load_block(v, own * V, live, columns, V) * factors[:, None], 0.0)
        reached = reaches_on(right, C) | (i >= marked)
        stored = tl.dot(solver, finite(right).to(solver.dtype), input_precision=PRECISION)
        store_block(u, own * V, live, columns, V, tl.where(reached[:, None], float("nan"), stored))
    if from_start is not None:
        factors *= tl.load(from_start + own, mask=live, other=0.0)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        if k is not None:
            erasers = load_block(k, (rows * GK + head // (H // GK)) * K, live, columns, K)
        else:
            erasers = load_block(w, own * K, live, columns, K)
        right = tl.where(whole[:, None], erasers * factors[:, None], 0.0).to(solver.dtype)
        erased = tl.dot(solver, right, input_precision=PRECISION)
        store_block(w, own * K, live, columns, K, tl.where(whole[:, None], erased, float("nan")))
