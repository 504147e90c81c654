# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""Triton kernels of the backward pass for one decay per head: dk and dv in one sweep, and the decays' gradients.

With D the gradient of the state, carried from a part's last chunk to its first, and f the scale,

    dv_j = e^{suffix_j} D^T k_j + f sum_{i>=j} (q_i . k_j) e^{between_ij} do_i
    dk_j = e^{suffix_j} D v_j   + f sum_{i>=j} (do_i . v_j) e^{between_ij} q_i
    D   <- e^{total} D + f sum_i e^{prefix_i} q_i do_i^T

The gradient of a token's log-decay is <e^{g_t} S_{t-1}, dS_t>. In a chunk with S the state before and D after it,

    dg_t = E + sum_{i>=t} r_i + sum_{j<t} w_j + sum_{j<t<=i} p_ij        E = <e^{total} S, D>
    r_i = f q_i . (e^{prefix_i} S do_i)                                  w_j = k_j . (e^{suffix_j} D v_j)
    p_ij = f (q_i . k_j) (do_i . v_j) e^{between_ij}

and E needs no state but those between parts: X = <S, dS> at a chunk's two ends differs from E by the chunk's sums of r
and w. So nothing is added that another token subtracts, but for one sum of r and w per chunk.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_forward import HEAD, TOKEN, decay_between, load_rows, walk


@triton.jit
def store_within(pairs, within, heads, at, stop, C: tl.constexpr):
    """Of pairs p [i, j], the sums over j < t <= i for each token t of the chunk."""
    steps = tl.arange(0, C)
    sums = tl.cumsum(pairs, 1)
    sums = tl.sum(tl.where(steps[:, None] > steps[None, :], sums, 0.0), 0)  # [j], of the token behind j
    rows = at + 1 + steps
    tl.store(within + rows.to(tl.int64) * heads, sums, mask=(rows < stop) & (steps + 1 < C))
    tl.store(within + (at + steps).to(tl.int64) * heads, tl.zeros((C,), tl.float32), mask=steps == 0)


@triton.jit
def sweep_keys_values(
    q, k, v, do, dk, dv, log, entering, leaving, parts, written,
    batch_q, token_q, head_q, batch_k, token_k, head_k, batch_v, token_v, head_v, batch_do, token_do, head_do,
    share_q, share_k, heads, batches, tokens, count, factor,
    DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BOK: tl.constexpr, BOV: tl.constexpr,
):  # fmt: skip
    """dk [B, T, H, K] and dv [B, T, H, V]; entering, leaving [B, P, H, K, V]: D behind and before each part.

    written [blocks of K, B, T, H], where given: w_j. Each program walks for a block of columns of one of the two. Those
    of one part and head stand side by side, run at the same time and read the same tokens, so that these come from
    memory once and from the cache after that; one program for all would need more registers than there are.
    """
    key_blocks: tl.constexpr = (K + BOK - 1) // BOK
    value_blocks: tl.constexpr = (V + BOV - 1) // BOV
    block = tl.program_id(0) % (key_blocks + value_blocks)
    rest = tl.program_id(0) // (key_blocks + value_blocks)
    if block < key_blocks:
        walk(
            rest * key_blocks + block, v, do, q, dk, None, log, None, entering, None, parts, written, k,
            batch_v, token_v, head_v, batch_do, token_do, head_do, batch_q, token_q, head_q, batch_k, token_k, head_k,
            1, 1, share_q, share_k, heads, batches, tokens, count, 0, factor,
            True, DECAY, TYPE, PRECISION, WIDE, True, V, K, C, BV, BOK,
        )  # fmt: skip
    else:
        walk(
            rest * value_blocks + block - key_blocks,
            k, q, do, dv, None, log, None, entering, leaving, parts, None, None,
            batch_k, token_k, head_k, batch_q, token_q, head_q, batch_do, token_do, head_do, 0, 0, 0,
            share_k, share_q, 1, 1, heads, batches, tokens, count, 0, factor,
            True, DECAY, TYPE, PRECISION, WIDE, False, K, V, C, BK, BOV,
        )  # fmt: skip


@triton.jit
def pairs_within(
    q, k, v, do, log, within, chunk_table,
    batch_q, token_q, head_q, batch_k, token_k, head_k, batch_v, token_v, head_v, batch_do, token_do, head_do,
    share_q, share_k, heads, tokens, chunks, factor,
    DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """within [B, T, H]: for each token the sum of p over the pairs around it. One program for each chunk and head."""
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    head = tl.program_id(0) // chunks % heads
    at, stop = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    q += batch * batch_q + (head // share_q).to(tl.int64) * head_q
    k += batch * batch_k + (head // share_k).to(tl.int64) * head_k
    v += batch * batch_v + head.to(tl.int64) * head_v
    do += batch * batch_do + head.to(tl.int64) * head_do
    token = batch * tokens * heads + head
    g = 0.0
    if DECAY == HEAD:
        g = tl.load(log + head).to(tl.float32)
    rows, columns = at + tl.arange(0, C), tl.arange(0, BK)
    scores, dscores = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        q_rows = load_rows(q, token_q, rows, stop, first + columns, K, BK, TYPE)
        k_rows = load_rows(k, token_k, rows, stop, first + columns, K, BK, TYPE)
        scores = tl.dot(q_rows, tl.trans(k_rows), acc=scores, input_precision=PRECISION)
    for first in range(0, V, BK):
        do_rows = load_rows(do, token_do, rows, stop, first + columns, V, BK, TYPE)
        v_rows = load_rows(v, token_v, rows, stop, first + columns, V, BK, TYPE)
        dscores = tl.dot(do_rows, tl.trans(v_rows), acc=dscores, input_precision=PRECISION)
    read = decay_between(log + token * (DECAY == TOKEN), heads, g, at, stop, DECAY, False, WIDE, C) * factor
    store_within(scores * (dscores * read), within + token, heads, at, stop, C)


@triton.jit
def decay_gradient(
    read, written, within, states, dstates, gradient, parts,
    heads, tokens, count, rows_of_blocks, read_blocks, written_blocks,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dg [B, T, H] float32 from r and w, [blocks, B, T, H] to be summed over blocks, and the sums of p [B, T, H].

    states, dstates [B, P, H, K, V]: S before each part (None: zeros), and its whole gradient.
    """
    part = tl.program_id(0) % count
    batch = (tl.program_id(0) // count // heads).to(tl.int64)
    head = tl.program_id(0) // count % heads
    start, stop = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1)
    token = batch * tokens * heads + head
    x = tl.zeros((), tl.float64)
    if states is not None:
        row = ((batch * count + part) * heads + head) * K * V
        for block in range(tl.cdiv(K * V, BK * BV)):
            cells = block * BK * BV + tl.arange(0, BK * BV)
            s = tl.load(states + row + cells, mask=cells < K * V, other=0)
            x += tl.sum(s * tl.load(dstates + row + cells, mask=cells < K * V, other=0), 0).to(tl.float64)
    steps = tl.arange(0, C)
    for m in range(tl.cdiv(stop - start, C)):
        rows = start + m * C + steps
        at = token + rows.to(tl.int64) * heads
        seen, before = rows < stop, (rows <= stop) & (steps > 0)
        r, w, w_before = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        for n in range(read_blocks):
            r += tl.load(read + rows_of_blocks * n + at, mask=seen, other=0)
        for n in range(written_blocks):
            w += tl.load(written + n * rows_of_blocks + at, mask=seen, other=0)
            w_before += tl.load(written + n * rows_of_blocks + at - heads, mask=before & seen, other=0)
        end = x - tl.sum(r, 0).to(tl.float64)
        own = tl.cumsum(r, 0, reverse=True) + tl.cumsum(w_before, 0) + tl.load(within + at, mask=seen, other=0)
        tl.store(gradient + at, own + end.to(tl.float32), mask=seen)
        x = end + tl.sum(w, 0).to(tl.float64)
