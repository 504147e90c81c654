"""Forward pass of softmax attention: one program for a block of queries of one head.

With s_ij = scale * q_i . k_j (softcap c: c * tanh(s_ij / c)) over the keys lo_i <= j < hi_i, block after block
(Milakov & Gimelshein 2018; Dao 2023, "FlashAttention-2", algorithm 1):

    m' = max(m, max_j s_ij),  p_ij = exp(s_ij - m')
    l' = e^{m - m'} l + sum_j p_ij,  o' = e^{m - m'} o + sum_j p_ij v_j

and at the end out_i = o / l, lse_i = m + log l. An exponent is kept times log2(e), so that a weight is one exp2.

Accumulating, o, l, m start from what earlier sets of keys left: o = out, l = 1, m = lse. So a step of a ring needs no
merge afterwards.

The keys seen by every query of the block come first, without mask and bounds, then those at both ends, masked. In a
masked block a weight of 0 times a NaN or inf in v would be NaN for queries that do not see that key. There v is taken
with such numbers as 0, and instead the score of every pair that sees them is made NaN, which its query's whole result
then is. In a block that all queries see nothing needs to be done.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from longtrain.kernels.softmax_attention.triton_common import (
    LN2,
    LOG2E,
    block_start,
    capped_tanh,
    ends_of,
    finite_part,
    is_finite,
    load_block,
    load_rows,
    rows_again,
    stretches,
    write,
)


@triton.jit
def _attend(
    acc,
    total,
    largest,
    q,
    q_block,
    inside,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    k_blocks,
    v_blocks,
    batch,
    group,
    first,
    head,
    middle,
    count,
    keys,
    lo,
    hi,
    scale,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`count` blocks of keys, in the middle or MASKED, for a block of queries: (acc, total, largest) = (o, l, m)."""
    SIZE: tl.constexpr = EDGE if MASKED else BLOCK_N
    rows = tl.arange(0, SIZE)
    columns_k, columns_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
    k_places = rows[:, None] * k_row + columns_k[None, :]
    v_places = rows[:, None] * v_row + columns_v[None, :]
    RELOAD: tl.constexpr = q.dtype == tl.float32  # see `triton_common`
    for index in tl.range(0, count, disable_licm=RELOAD):
        if RELOAD:
            q = load_rows(q_block, inside, columns_k, K, PADDED_K, True)
        start = block_start(index, first, head, middle, BLOCK_N, EDGE, MASKED)
        key = start + rows
        wide = tl.cast(start, tl.int64)
        k_block, v_block = k_ptr + wide * k_row + k_places, v_ptr + wide * v_row + v_places
        k = load_block(
            k_blocks, batch, group, start, k_block, key < keys, columns_k, K, SIZE, PADDED_K, MASKED, DESCRIPTORS
        )
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = load_block(
            v_blocks, batch, group, start, v_block, key < keys, columns_v, V, SIZE, PADDED_V, MASKED, DESCRIPTORS
        )
        if SOFTCAP:
            s = capped_tanh(s * scale) * softcap  # scale holds 1 / softcap, softcap log2(e)
        elif MASKED or not POSITIVE:
            s = s * scale
        if MASKED:
            v, bad = finite_part(v)
            seen = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
            s = tl.where(seen, tl.where((bad == 1)[None, :], float("nan"), s), float("-inf"))
        if MASKED or SOFTCAP or not POSITIVE:
            new = tl.maximum(largest, tl.max(s, axis=1))
            # With no key seen so far, -inf - -inf would be NaN.
            reference = tl.where(new == float("-inf"), 0.0, new) if MASKED else new
            p = tl.exp2(s - reference[:, None])
        else:
            new = tl.maximum(largest, tl.max(s, axis=1) * scale)
            reference = new
            p = tl.exp2(s * scale - new[:, None])  # one multiply-add
        shrink = tl.exp2(largest - reference)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new
    return acc, total, largest


@triton.jit(do_not_specialize=["lo_shift", "hi_shift", "queries", "keys", "share"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    k_blocks,
    v_blocks,
    lo_ptr,
    hi_ptr,
    lo_shift,
    hi_shift,
    queries,
    keys,
    heads,
    share,
    scale,
    softcap,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    lse_batch,
    lse_row,
    lse_head,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    VECTORS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    POSITIVE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """out [B, T, H, V] and lse [B, T, H] of q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; grid (blocks * H, B).

    ACCUMULATE: out and lse hold the result of earlier keys; a query that sees none of these is left untouched.
    Otherwise they are only written, with 0 and -inf for a query that sees none. REPAIR: they hold another kernel's
    result; only blocks in which out is not finite are computed. k_blocks, v_blocks: see `load_block`.
    """
    # Neighbouring programs share keys; the last queries, which see the most under a causal mask, come first.
    blocks = tl.cdiv(queries, BLOCK_M)
    head, batch_index = tl.program_id(0) % heads, tl.program_id(1)
    begin = (blocks - 1 - tl.program_id(0) // heads) * BLOCK_M
    end = tl.minimum(begin + BLOCK_M, queries) - 1
    group_index = head // share
    group, head, batch = group_index.to(tl.int64), head.to(tl.int64), batch_index.to(tl.int64)
    row = begin + tl.arange(0, BLOCK_M)
    inside = row < queries
    wide_row = row.to(tl.int64)

    lo_a, hi_a = ends_of(begin, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    lo_b, hi_b = ends_of(end, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    lo, hi = ends_of(row, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    sees = lo < hi
    out_ptr += batch * out_batch + head * out_head
    lse_block = lse_ptr + batch * lse_batch + head * lse_head + wide_row * lse_row
    if ACCUMULATE:
        if lo_a >= hi_b:
            return
    if REPAIR:
        if is_finite(out_ptr, row, out_row, inside, V, PADDED_V):
            return

    columns_k = tl.arange(0, PADDED_K)
    q_block = q_ptr + batch * q_batch + head * q_head + wide_row[:, None] * q_row + columns_k[None, :]
    q = load_rows(q_block, inside, columns_k, K, PADDED_K, True)
    if ACCUMULATE:
        largest = tl.load(lse_block, mask=inside, other=float("-inf")) * LOG2E
        total = tl.where(largest == float("-inf"), 0.0, 1.0)
        columns_v = tl.arange(0, PADDED_V)
        acc = load_rows(
            out_ptr + wide_row[:, None] * out_row + columns_v[None, :], inside, columns_v, V, PADDED_V, True
        )
    else:
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED_V], tl.float32)

    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    head_blocks, middle_blocks, tail_blocks = stretches(lo_a, hi_a, lo_b, hi_b, BLOCK_N, EDGE)
    for masked in tl.static_range(2):
        acc, total, largest = _attend(
            acc,
            total,
            largest,
            q,
            q_block,
            inside,
            k_ptr,
            v_ptr,
            k_row,
            v_row,
            k_blocks,
            v_blocks,
            batch_index,
            group_index,
            lo_a,
            head_blocks,
            middle_blocks,
            head_blocks + tail_blocks if masked else middle_blocks,
            keys,
            lo,
            hi,
            scale,
            softcap,
            K,
            V,
            PADDED_K,
            PADDED_V,
            BLOCK_N,
            EDGE,
            SOFTCAP,
            POSITIVE,
            DESCRIPTORS,
            masked == 1,
        )
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    lse = (tl.where(sees, largest, 0.0) + tl.log2(tl.where(sees, total, 1.0))) * LN2
    row, inside = rows_again(begin, queries, BLOCK_M)
    if ACCUMULATE:
        inside = inside & sees
    else:
        lse = tl.where(sees, lse, float("-inf"))
        acc = tl.where(sees[:, None], acc, 0.0)
    write(out_ptr, row, out_row, inside, acc, V, PADDED_V, False)
    tl.store(lse_block, lse, mask=inside)
