# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""Triton kernels for decays per channel: what happens inside chunks, one program for each chunk and head.

There the decay stands inside the product, q_i . (e^{between_ij} k_j), and e^{-cumsum} would overflow. So a chunk is
halved again and again, as in `decays.Halvings`: any i > j lie in the two halves of exactly one block of 2 h tokens, and
with its middle as reference both factors are at most 1,

    e^{between_ij} = e^{rise_i} e^{fall_j}     rise_i: from the middle to i,  fall_j: from behind j to the middle

Of a token either rise or fall is wanted at each h = 1, 2, 4 ... C/2 (by bit h of its place), so a level costs one
exponential per number and one product of C x C, masked to its blocks; the diagonal knows no decay. All sums of
log-decays are sums of their own terms: -inf works, and nothing is subtracted.

The sweeps between chunks (`triton_forward.py`) then read readers_i = f e^{prefix_i} q_i, written_j = e^{suffix_j} k_j
and the scores, and give dreaders_i = S do_i and dwritten_j = D v_j. "Gated Linear Attention Transformers with
Hardware-Efficient Training" (Yang et al. 2024, section 4.3) has one level of references and takes other pairs singly.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_forward import finite, load_rows


@triton.jit
def sums_of_halves(g, bit, H: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """For each token's block of 2 H: the sum of g over its first half where the token lies in the second, and (apart)
    the sum over the second where it lies in the first; both [C, BK], zeros elsewhere."""
    halves = tl.sum(tl.reshape(g, (C // (2 * H), 2, H, BK)), 2)  # [blocks, 2, BK]
    second = tl.arange(0, 2)[None, :, None] == 1
    first_sum = tl.sum(tl.where(second, 0.0, halves), 1)[:, None, :]
    second_sum = tl.sum(tl.where(second, halves, 0.0), 1)[:, None, :]
    first_sum = tl.reshape(tl.broadcast_to(first_sum, (C // (2 * H), 2 * H, BK)), (C, BK))
    second_sum = tl.reshape(tl.broadcast_to(second_sum, (C // (2 * H), 2 * H, BK)), (C, BK))
    return tl.where(bit, first_sum, 0.0), tl.where(bit, 0.0, second_sum)


@triton.jit
def within_blocks(LEVEL: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """[C, C]: rows in the second half of a block of 2^(LEVEL+1) tokens, columns in its first; or TRANSPOSED."""
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    same = (i >> (LEVEL + 1)) == (j >> (LEVEL + 1))
    if TRANSPOSED:
        return same & (((i >> LEVEL) & 1) == 0) & (((j >> LEVEL) & 1) == 1)
    return same & (((i >> LEVEL) & 1) == 1) & (((j >> LEVEL) & 1) == 0)


@triton.jit
def prepare(
    q, k, log, readers, written, scores, totals, chunk_table,
    batch_q, token_q, head_q, batch_k, token_k, head_k, share_q, share_k, heads, tokens, chunks, factor,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """readers, written [B, T, H, K], scores [B, T, H, C] (token i's for token j of its chunk), totals [B, M, H, K].

    log: [B, T, H, K], contiguous, as all results. Scores of columns beyond the chunk's tokens are zeros.
    """
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    head = tl.program_id(0) // chunks % heads
    at, stop = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    q += batch * batch_q + (head // share_q).to(tl.int64) * head_q
    k += batch * batch_k + (head // share_k).to(tl.int64) * head_k
    token = batch * tokens * heads + head
    steps = tl.arange(0, C)
    rows = at + steps
    score = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        seen = (rows < stop)[:, None] & (columns < K)[None, :]
        own = rows.to(tl.int64)[:, None] * heads * K + columns[None, :]
        q_rows = load_rows(q, token_q, rows, stop, columns, K, BK, tl.float32) * factor
        k_rows = load_rows(k, token_k, rows, stop, columns, K, BK, tl.float32)
        g = tl.load(log + token * K + own, mask=seen, other=0).to(tl.float32)
        diagonal = tl.sum(q_rows * k_rows, 1)[:, None]
        score += tl.where(steps[:, None] == steps[None, :], diagonal, 0.0)
        prefix, suffix = g, tl.zeros((C, BK), tl.float32)
        for level in tl.static_range(LEVELS):
            bit = (((steps >> level) & 1) == 1)[:, None]
            decay = tl.exp(tl.where(bit, prefix, suffix))
            reading = tl.where(bit, q_rows * decay, 0.0).to(TYPE)
            writing = tl.where(bit, 0.0, k_rows * decay).to(TYPE)
            found = tl.dot(reading, tl.trans(writing), input_precision=PRECISION)
            score += tl.where(within_blocks(level, C, False), found, 0.0)
            before, behind = sums_of_halves(g, bit, 2**level, C, BK)
            prefix += before
            suffix += behind
        tl.store(readers + token * K + own, (q_rows * tl.exp(prefix)).to(readers.dtype.element_ty), mask=seen)
        tl.store(written + token * K + own, (k_rows * tl.exp(suffix)).to(written.dtype.element_ty), mask=seen)
        to = totals + ((batch * chunks + chunk) * heads + head) * K + columns
        tl.store(to, tl.sum(g, 0), mask=columns < K)
    to = scores + token * C + rows.to(tl.int64)[:, None] * heads * C + steps[None, :]
    tl.store(to, score.to(scores.dtype.element_ty), mask=(rows < stop)[:, None])


@triton.jit
def row_products(x, y, row, k, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Rowsums of the product of two states [K, V] that begin at `row`, float64 [BK]; a state that is None is 0."""
    found = tl.zeros((BK,), tl.float64)
    if x is not None:
        if y is not None:
            for first in range(0, V, BV):
                v = first + tl.arange(0, BV)
                inside = (k < K)[:, None] & (v < V)[None, :]
                cell = row + k[:, None] * V + v[None, :]
                s = tl.load(x + cell, mask=inside, other=0) * tl.load(y + cell, mask=inside, other=0)
                found += tl.sum(s, 1).to(tl.float64)
    return found


@triton.jit
def sum_of_products(x, y, own, seen):
    """Over the tokens of a chunk, float64 [BK]."""
    found = tl.load(x + own, mask=seen, other=0).to(tl.float32) * tl.load(y + own, mask=seen, other=0)
    return tl.sum(found, 0).to(tl.float64)


@triton.jit
def chunk_ends(
    readers, dreaders, written, dwritten, states, leaving, dstates, dentering, ends, parts,
    heads, tokens, count, chunks,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """ends [B, M, H, K], each chunk's E = rowsum(e^{total} S * D), by the running sums of `triton_backward.py`.

    readers, dreaders, written, dwritten [B, T, H, K]; the states as in `decay_gradient` there, and as there from a
    part's start or, where that is not finite, from its end.
    """
    kb = tl.program_id(0) % tl.cdiv(K, BK)
    rest = tl.program_id(0) // tl.cdiv(K, BK)
    part = rest % count
    batch = (rest // count // heads).to(tl.int64)
    head = rest // count % heads
    start, stop, first_chunk = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1), tl.load(parts + 4 * part + 3)
    k = kb * BK + tl.arange(0, BK)
    row = ((batch * count + part) * heads + head) * K * V
    token = (batch * tokens * heads + head) * K
    to = ends + ((batch * chunks + first_chunk) * heads + head) * K + k
    n = tl.cdiv(stop - start, C)
    x = row_products(states, dentering, row, k, K, V, BK, BV)
    for m in range(n):
        rows = start + m * C + tl.arange(0, C)
        seen = (rows < stop)[:, None] & (k < K)[None, :]
        own = token + rows.to(tl.int64)[:, None] * heads * K + k[None, :]
        x -= sum_of_products(readers, dreaders, own, seen)
        tl.store(to, x.to(tl.float32), mask=k < K)
        to += heads * K
        x += sum_of_products(written, dwritten, own, seen)
    if tl.sum(x * 0.0, 0) != 0:
        y = row_products(leaving, dstates, row, k, K, V, BK, BV)
        for back in range(n):
            rows = start + (n - 1 - back) * C + tl.arange(0, C)
            seen = (rows < stop)[:, None] & (k < K)[None, :]
            own = token + rows.to(tl.int64)[:, None] * heads * K + k[None, :]
            to -= heads * K
            y -= sum_of_products(written, dwritten, own, seen)
            first = tl.load(to, mask=k < K, other=0)
            tl.store(to, tl.where(tl.abs(first) < float("inf"), first, y.to(tl.float32)), mask=k < K)
            y += sum_of_products(readers, dreaders, own, seen)


@triton.jit
def gradients_within(
    q, k, v, do, log, dreaders, dwritten, ends, dq, dk, dlog, chunk_table,
    batch_q, token_q, head_q, batch_k, token_k, head_k, batch_v, token_v, head_v, batch_do, token_do, head_do,
    share_q, share_k, heads, tokens, chunks, factor,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dq, dk [B, T, H, K] and dlog, alike and float32 (None: not asked for), from dreaders, dwritten and `ends`.

    A masked weight is 0, and 0 * NaN is NaN. So what is not finite is taken out of the operands of products, and NaN
    put into the weights of its token instead, where it reaches whoever sees that token and nobody else.
    """
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    head = tl.program_id(0) // chunks % heads
    at, stop = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    q += batch * batch_q + (head // share_q).to(tl.int64) * head_q
    k += batch * batch_k + (head // share_k).to(tl.int64) * head_k
    v += batch * batch_v + head.to(tl.int64) * head_v
    do += batch * batch_do + head.to(tl.int64) * head_do
    token = (batch * tokens * heads + head) * K
    steps = tl.arange(0, C)
    rows = at + steps
    # Gradients of the scores, [i, j], and the same as [j, i].
    dscores, transposed = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, V, BK):
        columns = first + tl.arange(0, BK)
        v_rows = load_rows(v, token_v, rows, stop, columns, V, BK, TYPE)
        do_rows = load_rows(do, token_do, rows, stop, columns, V, BK, TYPE)
        dscores = tl.dot(do_rows, tl.trans(v_rows), acc=dscores, input_precision=PRECISION)
        transposed = tl.dot(v_rows, tl.trans(do_rows), acc=transposed, input_precision=PRECISION)
    diagonal = tl.sum(tl.where(steps[:, None] == steps[None, :], dscores, 0.0), 1)[:, None]
    dscores, transposed = dscores.to(TYPE), transposed.to(TYPE)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        seen = (rows < stop)[:, None] & (columns < K)[None, :]
        own = token + rows.to(tl.int64)[:, None] * heads * K + columns[None, :]
        q_rows = load_rows(q, token_q, rows, stop, columns, K, BK, tl.float32) * factor
        k_rows = load_rows(k, token_k, rows, stop, columns, K, BK, tl.float32)
        g = tl.load(log + own, mask=seen, other=0).to(tl.float32)
        dscores += tl.sum(k_rows * 0.0, 1)[None, :].to(TYPE)  # 0, or NaN
        transposed += tl.sum(q_rows * 0.0, 1)[None, :].to(TYPE)
        # From other tokens of the chunk. A token's product with itself comes last: no decay lies between.
        dq_rows, dk_rows = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
        prefix, suffix = g, tl.zeros((C, BK), tl.float32)
        for level in tl.static_range(LEVELS):
            bit = (((steps >> level) & 1) == 1)[:, None]
            decay = tl.exp(tl.where(bit, prefix, suffix))
            reading = finite(tl.where(bit, q_rows * decay, 0.0))
            writing = finite(tl.where(bit, 0.0, k_rows * decay))
            weights = tl.where(within_blocks(level, C, False), dscores, 0.0)
            dreading = tl.dot(weights, writing.to(TYPE), input_precision=PRECISION)
            weights = tl.where(within_blocks(level, C, True), transposed, 0.0)
            dwriting = tl.dot(weights, reading.to(TYPE), input_precision=PRECISION)
            dq_rows += tl.where(bit, dreading * decay, 0.0)
            dk_rows += tl.where(bit, 0.0, dwriting * decay)
            before, behind = sums_of_halves(g, bit, 2**level, C, BK)
            prefix += before
            suffix += behind
        prefix, suffix = tl.exp(prefix), tl.exp(suffix)
        through_q = tl.load(dreaders + own, mask=seen, other=0) * prefix
        through_k = tl.load(dwritten + own, mask=seen, other=0) * suffix
        if dlog is not None:
            # As in `triton_backward.py`: pairs j < t <= i are all with i >= t but those with j >= t too, or all with
            # j < t but those with i < t too, which is the same where both are finite.
            within = q_rows * dq_rows - k_rows * dk_rows
            dg = tl.cumsum(within, 0, reverse=True)
            dg = tl.where(tl.abs(dg) < float("inf"), dg, within - tl.cumsum(within, 0))
            end = tl.load(ends + ((batch * chunks + chunk) * heads + head) * K + columns, mask=columns < K, other=0)
            w = through_k * k_rows
            dg += tl.cumsum(through_q * q_rows, 0, reverse=True) + (tl.cumsum(w, 0) - w) + end[None, :]
            tl.store(dlog + own, dg, mask=seen)
        dq_rows, dk_rows = dq_rows + through_q + diagonal * k_rows, dk_rows + through_k + diagonal * q_rows
        tl.store(dq + own, (dq_rows * factor).to(dq.dtype.element_ty), mask=seen)
        tl.store(dk + own, dk_rows.to(dk.dtype.element_ty), mask=seen)
