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

and all of it falls out of the sweeps for dq and dk: r_i and w_j are q_i . dq_i and k_j . dk_j as far as these came
through the state; x_i = sum_{j<i} p_ij and y_j = sum_{i>j} p_ij are the same as far as they came from other tokens of
the chunk. Pairs j < t <= i are all with i >= t but those with j >= t too:

    sum_{j<t<=i} p_ij = sum_{i>=t} (x_i - y_i) = sum_{j<t} (y_j - x_j)

A token's product with itself, which would be in both x and y, is left out: it may be far larger than what remains.
E needs no state but those between parts: X = <S, dS> at a chunk's two ends differs from E by the chunk's sums of r and
w. So nothing is subtracted that was added before, but for sums over one chunk.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_forward import walk


@triton.jit
def sweep_keys_values(
    q, k, v, do, dk, dv, log, entering, leaving, parts, through, within, key_flags, value_flags,
    batch_q, token_q, head_q, batch_k, token_k, head_k, batch_v, token_v, head_v, batch_do, token_do, head_do,
    share_q, share_k, heads, batches, tokens, count, factor,
    DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BOK: tl.constexpr, BOV: tl.constexpr,
):  # fmt: skip
    """dk [B, T, H, K] and dv [B, T, H, V]; entering, leaving [B, P, H, K, V]: D behind and before each part.

    through, within [blocks of K, B, T, H], where given: w_j and y_j. Each program walks for a block of columns of one
    of the two; one program for all would need more registers than there are. Those of one part and head stand side by
    side and read the same tokens at about the same time.
    """
    key_blocks: tl.constexpr = (K + BOK - 1) // BOK
    value_blocks: tl.constexpr = (V + BOV - 1) // BOV
    block = tl.program_id(0) % (key_blocks + value_blocks)
    rest = tl.program_id(0) // (key_blocks + value_blocks)
    if block < key_blocks:
        walk(
            rest * key_blocks + block,
            v, do, q, dk, None, log, None, entering, None, parts, through, within, k, key_flags,
            batch_v, token_v, head_v, batch_do, token_do, head_do, batch_q, token_q, head_q, batch_k, token_k, head_k,
            1, 1, share_q, share_k, heads, batches, tokens, count, 0, factor,
            True, DECAY, TYPE, PRECISION, WIDE, True, V, K, C, BV, BOK, False,
        )  # fmt: skip
    else:
        walk(
            rest * value_blocks + block - key_blocks,
            k, q, do, dv, None, log, None, entering, leaving, parts, None, None, None, value_flags,
            batch_k, token_k, head_k, batch_q, token_q, head_q, batch_do, token_do, head_do, 0, 0, 0,
            share_k, share_q, 1, 1, heads, batches, tokens, count, 0, factor,
            True, DECAY, TYPE, PRECISION, WIDE, False, K, V, C, BK, BOV, False,
        )  # fmt: skip


@triton.jit
def product_of_states(x, y, row, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """<x, y> of two states [K, V] that begin at `row`, float64; a state that is None is 0."""
    found = tl.zeros((), tl.float64)
    if x is not None:
        if y is not None:
            for block in range(tl.cdiv(K * V, BK * BV)):
                cells = block * BK * BV + tl.arange(0, BK * BV)
                seen = cells < K * V
                s = tl.load(x + row + cells, mask=seen, other=0) * tl.load(y + row + cells, mask=seen, other=0)
                found += tl.sum(s, 0).to(tl.float64)
    return found


@triton.jit
def decay_gradient(
    read, written, read_within, written_within, states, leaving, dstates, dentering, gradient, parts,
    heads, tokens, count,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dg [B, T, H] float32 from r, w, x and y, all alike.

    states, leaving, dentering, dstates [B, P, H, K, V]: S before and after each part, and the whole gradients of these
    (None: zeros). E is found from the part's start, where NaN or inf among queries or output gradients would reach all
    tokens, also those behind, which do not see them; for these it is found from the part's end.
    """
    part = tl.program_id(0) % count
    batch = (tl.program_id(0) // count // heads).to(tl.int64)
    head = tl.program_id(0) // count % heads
    start, stop = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1)
    token = batch * tokens * heads + head
    row = ((batch * count + part) * heads + head) * K * V
    steps = tl.arange(0, C)
    n = tl.cdiv(stop - start, C)
    x = product_of_states(states, dentering, row, K, V, BK, BV)
    for m in range(n):
        rows = start + m * C + steps
        at = token + rows.to(tl.int64) * heads
        seen = rows < stop
        before = seen & (steps > 0)
        r = tl.load(read + at, mask=seen, other=0)
        w = tl.load(written + at, mask=seen, other=0)
        w_before = tl.load(written + at - heads, mask=before, other=0)
        inner = tl.load(read_within + at, mask=seen, other=0)
        inner -= tl.load(written_within + at, mask=seen, other=0)
        inner_before = tl.load(written_within + at - heads, mask=before, other=0)
        inner_before -= tl.load(read_within + at - heads, mask=before, other=0)
        inner, inner_before = tl.cumsum(inner, 0, reverse=True), tl.cumsum(inner_before, 0)
        # Equal where both are finite.
        own = tl.where(tl.abs(inner) < float("inf"), inner, inner_before)
        own += tl.cumsum(r, 0, reverse=True) + tl.cumsum(w_before, 0)
        end = x - tl.sum(r, 0).to(tl.float64)
        tl.store(gradient + at, own + end.to(tl.float32), mask=seen)
        x = end + tl.sum(w, 0).to(tl.float64)
    if x * 0.0 != 0:
        y = product_of_states(leaving, dstates, row, K, V, BK, BV)
        for back in range(n):
            rows = start + (n - 1 - back) * C + steps
            at = token + rows.to(tl.int64) * heads
            seen = rows < stop
            before = seen & (steps > 0)
            r = tl.load(read + at, mask=seen, other=0)
            w = tl.load(written + at, mask=seen, other=0)
            w_before = tl.load(written + at - heads, mask=before, other=0)
            inner = tl.load(read_within + at, mask=seen, other=0)
            inner -= tl.load(written_within + at, mask=seen, other=0)
            end = y - tl.sum(w, 0).to(tl.float64)
            own = tl.cumsum(r, 0, reverse=True) + tl.cumsum(w_before, 0) + tl.cumsum(inner, 0, reverse=True)
            first = tl.load(gradient + at, mask=seen, other=0)
            own = tl.where(tl.abs(first) < float("inf"), first, own + end.to(tl.float32))
            tl.store(gradient + at, own, mask=seen)
            y = end + tl.sum(r, 0).to(tl.float64)
