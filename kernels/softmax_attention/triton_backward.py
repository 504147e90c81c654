"""Backward pass of softmax attention: dQ by blocks of queries, dK and dV by blocks of keys, without atomic additions.

With t_ij = scale * q_i . k_j, s_ij = t_ij (softcap c: c * tanh(t_ij / c)), p_ij = exp(s_ij - lse_i) made from lse, and
delta_i = dout_i . out_i - dlse_i (Dao et al. 2022, "FlashAttention", appendix B.2):

    dp_ij = dout_i . v_j,  ds_ij = p_ij (dp_ij - delta_i),  dt_ij = ds_ij (softcap: ds_ij (1 - (s_ij / c)^2))
    dv_j = sum_i p_ij dout_i,  dk_j = scale * sum_i dt_ij q_i,  dq_i = scale * sum_j dt_ij k_j

A program of dK, dV goes through all heads that share its key head, so nothing is expanded. It computes p and dt
transposed, [keys, queries], so that no product has to be turned over.

As in forward, blocks are masked only where not all of their pairs are visible, and there NaN and inf are contained:
what a weight multiplies (k for dQ, q and dout for dK and dV) is taken with such numbers as 0, and the weight of every
visible pair that holds one is NaN.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from longtrain.kernels.softmax_attention.triton_common import (
    LOG2E,
    block_start,
    capped_tanh,
    ends_of,
    finite_part,
    is_finite,
    load_block,
    load_numbers,
    load_rows,
    rows_again,
    stretches,
    write,
)


@triton.jit(do_not_specialize=["queries"])
def prepare_kernel(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    cast_ptr,
    delta_ptr,
    exponent_ptr,
    queries,
    heads,
    out_batch,
    out_row,
    out_head,
    dout_batch,
    dout_row,
    dout_head,
    lse_batch,
    lse_row,
    lse_head,
    dlse_batch,
    dlse_row,
    dlse_head,
    V: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAST: tl.constexpr,
    DLSE: tl.constexpr,
):
    """delta = rowsum(dout * out) - dlse and lse * log2(e), both [B, H, T]; CAST: dout in the dtype of k and v."""
    head, batch = tl.program_id(0) % heads, tl.program_id(1)
    row = (tl.program_id(0) // heads) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < queries
    columns = tl.arange(0, PADDED_V)
    inside_out = inside[:, None] & (columns < V)[None, :]
    row = row.to(tl.int64)
    place = (batch * heads + head).to(tl.int64) * queries + row
    head, batch = head.to(tl.int64), batch.to(tl.int64)
    out_block = out_ptr + batch * out_batch + head * out_head + row[:, None] * out_row + columns[None, :]
    dout_block = dout_ptr + batch * dout_batch + head * dout_head + row[:, None] * dout_row + columns[None, :]
    out = tl.load(out_block, mask=inside_out, other=0.0).to(tl.float32)
    dout = tl.load(dout_block, mask=inside_out, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out, axis=1)
    lse = tl.load(lse_ptr + batch * lse_batch + head * lse_head + row * lse_row, mask=inside, other=0.0)
    if DLSE:
        delta -= tl.load(dlse_ptr + batch * dlse_batch + head * dlse_head + row * dlse_row, mask=inside, other=0.0)
    tl.store(delta_ptr + place, delta, mask=inside)
    tl.store(exponent_ptr + place, lse * LOG2E, mask=inside)
    if CAST:
        cast = cast_ptr + ((batch * queries + row) * heads + head)[:, None] * V + columns[None, :]
        tl.store(cast, dout.to(cast_ptr.dtype.element_ty), mask=inside_out)


@triton.jit
def _weights(s, exponent, poison, seen, scale, softcap, SOFTCAP: tl.constexpr, MASKED: tl.constexpr):
    """p from q . k and lse, both times log2(e), and dt / ds; in a masked block NaN where `poison`, 0 where not `seen`.

    scale holds log2(e), or with a softcap 1 / softcap, and softcap log2(e).
    """
    slope = s
    if SOFTCAP:
        tanh = capped_tanh(s * scale)
        slope = 1.0 - tanh * tanh
        difference = tanh * softcap - exponent
    else:
        difference = s * scale - exponent
    if MASKED:
        difference = tl.where(seen, tl.where(poison, float("nan"), difference), float("-inf"))
    return tl.exp2(difference), slope


@triton.jit
def _dq_blocks(
    dq,
    q,
    dout,
    q_block,
    dout_block,
    inside,
    exponent,
    delta,
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
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`count` blocks of keys, in the middle or MASKED, added to a block's dq / scale."""
    SIZE: tl.constexpr = EDGE if MASKED else BLOCK_N
    rows = tl.arange(0, SIZE)
    columns_k, columns_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
    k_places = rows[:, None] * k_row + columns_k[None, :]
    v_places = rows[:, None] * v_row + columns_v[None, :]
    RELOAD: tl.constexpr = q.dtype == tl.float32  # see `triton_common`
    for index in tl.range(0, count, disable_licm=RELOAD):
        if RELOAD:
            q = load_rows(q_block, inside, columns_k, K, PADDED_K, True)
            dout = load_rows(dout_block, inside, columns_v, V, PADDED_V, True)
        start = block_start(index, first, head, middle, BLOCK_N, EDGE, MASKED)
        key = start + rows
        wide = tl.cast(start, tl.int64)
        k_block, v_block = k_ptr + wide * k_row + k_places, v_ptr + wide * v_row + v_places
        k = load_block(
            k_blocks, batch, group, start, k_block, key < keys, columns_k, K, SIZE, PADDED_K, MASKED, DESCRIPTORS
        )
        v = load_block(
            v_blocks, batch, group, start, v_block, key < keys, columns_v, V, SIZE, PADDED_V, MASKED, DESCRIPTORS
        )
        seen = (lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])
        poison = seen
        if MASKED:
            k, bad = finite_part(k)
            poison = (bad == 1)[None, :]
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p, slope = _weights(s, exponent[:, None], poison, seen, scale, softcap, SOFTCAP, MASKED)
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dt = p * (dp - delta[:, None])
        if SOFTCAP:
            dt *= slope
        if MASKED:
            dt = tl.where(seen, dt, 0.0)  # 0 * NaN from v
        dq = tl.dot(dt.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["lo_shift", "hi_shift", "queries", "keys", "share"])
def dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    exponent_ptr,
    delta_ptr,
    dq_ptr,
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
    out_scale,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    dout_batch,
    dout_row,
    dout_head,
    dq_batch,
    dq_row,
    dq_head,
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
    ACCUMULATE: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """dq [B, T, H, K]; grid (blocks of queries * H, B). ACCUMULATE: added to it. REPAIR: only where it isn't finite.

    k_blocks, v_blocks, and q_blocks and dout_blocks of `dkdv_kernel`: see `load_block`.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    head, batch_index = tl.program_id(0) % heads, tl.program_id(1)
    begin = (blocks - 1 - tl.program_id(0) // heads) * BLOCK_M
    end = tl.minimum(begin + BLOCK_M, queries) - 1
    group_index = head // share
    row = begin + tl.arange(0, BLOCK_M)
    inside = row < queries
    wide_row = row.to(tl.int64)
    columns_k, columns_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
    place = (batch_index * heads + head).to(tl.int64) * queries + wide_row
    group, head, batch = group_index.to(tl.int64), head.to(tl.int64), batch_index.to(tl.int64)

    lo_a, hi_a = ends_of(begin, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    lo_b, hi_b = ends_of(end, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    lo, hi = ends_of(row, queries, lo_ptr, hi_ptr, lo_shift, hi_shift, keys, VECTORS)
    dq_ptr += batch * dq_batch + head * dq_head
    if ACCUMULATE:
        if lo_a >= hi_b:
            return
    if REPAIR:
        if is_finite(dq_ptr, row, dq_row, inside, K, PADDED_K):
            return

    q_block = q_ptr + batch * q_batch + head * q_head + wide_row[:, None] * q_row + columns_k[None, :]
    dout_block = dout_ptr + batch * dout_batch + head * dout_head + wide_row[:, None] * dout_row + columns_v[None, :]
    q = load_rows(q_block, inside, columns_k, K, PADDED_K, True)
    dout = load_rows(dout_block, inside, columns_v, V, PADDED_V, True)
    exponent = tl.load(exponent_ptr + place, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + place, mask=inside, other=0.0)
    k_ptr += batch * k_batch + group * k_head
    v_ptr += batch * v_batch + group * v_head
    dq = tl.zeros([BLOCK_M, PADDED_K], tl.float32)
    head_blocks, middle_blocks, tail_blocks = stretches(lo_a, hi_a, lo_b, hi_b, BLOCK_N, EDGE)
    for masked in tl.static_range(2):
        dq = _dq_blocks(
            dq,
            q,
            dout,
            q_block,
            dout_block,
            inside,
            exponent,
            delta,
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
            DESCRIPTORS,
            masked == 1,
        )
    row, inside = rows_again(begin, queries, BLOCK_M)
    write(dq_ptr, row, dq_row, inside, dq * out_scale, K, PADDED_K, ACCUMULATE)


@triton.jit
def _dkdv_blocks(
    dk,
    dv,
    k,
    v,
    k_block,
    v_block,
    keys_inside,
    q_ptr,
    dout_ptr,
    exponent_ptr,
    delta_ptr,
    q_row,
    q_head,
    dout_row,
    dout_head,
    q_blocks,
    dout_blocks,
    batch,
    group,
    share,
    begin,
    head,
    middle,
    count,
    queries,
    first,
    stop,
    scale,
    softcap,
    K: tl.constexpr,
    V: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EDGE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`count` blocks of queries, in the middle or MASKED, of `share` heads, added to a block's dk / scale and dv."""
    SIZE: tl.constexpr = EDGE if MASKED else BLOCK_M
    STAGES: tl.constexpr = 1 if MASKED else None  # masks take the registers that a pipeline would need
    rows = tl.arange(0, SIZE)
    columns_k, columns_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
    q_places = rows[:, None] * q_row + columns_k[None, :]
    dout_places = rows[:, None] * dout_row + columns_v[None, :]
    RELOAD: tl.constexpr = k.dtype == tl.float32  # see `triton_common`
    for index in tl.range(0, count * share, num_stages=STAGES, disable_licm=RELOAD):
        if RELOAD:
            k = load_rows(k_block, keys_inside, columns_k, K, PADDED_K, True)
            v = load_rows(v_block, keys_inside, columns_v, V, PADDED_V, True)
        start = block_start(index % count, begin, head, middle, BLOCK_M, EDGE, MASKED)
        query = start + rows
        inside = query < queries
        wide, member = tl.cast(start, tl.int64), tl.cast(index // count, tl.int64)
        q_block = q_ptr + (member * q_head + wide * q_row) + q_places
        dout_block = dout_ptr + (member * dout_head + wide * dout_row) + dout_places
        numbers = member * queries + start
        one = group * share + index // count
        q = load_block(q_blocks, batch, one, start, q_block, inside, columns_k, K, SIZE, PADDED_K, MASKED, DESCRIPTORS)
        dout = load_block(
            dout_blocks, batch, one, start, dout_block, inside, columns_v, V, SIZE, PADDED_V, MASKED, DESCRIPTORS
        )
        seen = (first[:, None] <= query[None, :]) & (query[None, :] < stop[:, None])
        poison = seen
        if MASKED:
            q, bad_q = finite_part(q)
            dout, bad_dout = finite_part(dout)
            poison = ((bad_q + bad_dout) > 0)[None, :]
        # Every thread holds a share of these two for each of its rows: each is loaded where it is needed.
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        exponent = load_numbers(exponent_ptr + numbers + rows, inside, MASKED)
        p, slope = _weights(s, exponent[None, :], poison, seen, scale, softcap, SOFTCAP, MASKED)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        delta = load_numbers(delta_ptr + numbers + rows, inside, MASKED)
        dt = p * (dp - delta[None, :])
        if SOFTCAP:
            dt *= slope
        if MASKED:
            dt = tl.where(seen, dt, 0.0)  # 0 * NaN from delta
        dk = tl.dot(dt.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["first_shift", "stop_shift", "queries", "keys", "share"])
def dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    exponent_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    q_blocks,
    dout_blocks,
    first_ptr,
    stop_ptr,
    first_shift,
    stop_shift,
    queries,
    keys,
    groups,
    share,
    scale,
    softcap,
    out_scale,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    dout_batch,
    dout_row,
    dout_head,
    dk_batch,
    dk_row,
    dk_head,
    dv_batch,
    dv_row,
    dv_head,
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
    ACCUMULATE: tl.constexpr,
    REPAIR: tl.constexpr,
):
    """dk [B, S, G, K] and dv [B, S, G, V]; grid (blocks of keys * G, B). ACCUMULATE, REPAIR as in `dq_kernel`."""
    # The first keys, which the most queries see under a causal mask, come first.
    group_index, batch_index = tl.program_id(0) % groups, tl.program_id(1)
    begin = (tl.program_id(0) // groups) * BLOCK_N
    end = tl.minimum(begin + BLOCK_N, keys) - 1
    row = begin + tl.arange(0, BLOCK_N)
    inside = row < keys
    wide_row = row.to(tl.int64)
    columns_k, columns_v = tl.arange(0, PADDED_K), tl.arange(0, PADDED_V)
    place = (batch_index * groups + group_index).to(tl.int64) * share * queries
    group, batch = group_index.to(tl.int64), batch_index.to(tl.int64)

    first_a, stop_a = ends_of(begin, keys, first_ptr, stop_ptr, first_shift, stop_shift, queries, VECTORS)
    first_b, stop_b = ends_of(end, keys, first_ptr, stop_ptr, first_shift, stop_shift, queries, VECTORS)
    if ACCUMULATE:
        if first_a >= stop_b:
            return
    if REPAIR:
        dk_place, dv_place = batch * dk_batch + group * dk_head, batch * dv_batch + group * dv_head
        finite = is_finite(dk_ptr + dk_place, row, dk_row, inside, K, PADDED_K)
        if finite & is_finite(dv_ptr + dv_place, row, dv_row, inside, V, PADDED_V):
            return

    k_block = k_ptr + batch * k_batch + group * k_head + wide_row[:, None] * k_row + columns_k[None, :]
    v_block = v_ptr + batch * v_batch + group * v_head + wide_row[:, None] * v_row + columns_v[None, :]
    k = load_rows(k_block, inside, columns_k, K, PADDED_K, True)
    v = load_rows(v_block, inside, columns_v, V, PADDED_V, True)
    dk = tl.zeros([BLOCK_N, PADDED_K], tl.float32)
    if ACCUMULATE:  # from the start: at the end both results and one more would be in registers
        dv_block = dv_ptr + batch * dv_batch + group * dv_head + wide_row[:, None] * dv_row + columns_v[None, :]
        dv = load_rows(dv_block, inside, columns_v, V, PADDED_V, True)
    else:
        dv = tl.zeros([BLOCK_N, PADDED_V], tl.float32)
    q_ptr += batch * q_batch + group * share * q_head
    dout_ptr += batch * dout_batch + group * share * dout_head
    exponent_ptr += place
    delta_ptr += place
    head_blocks, middle_blocks, tail_blocks = stretches(first_a, stop_a, first_b, stop_b, BLOCK_M, EDGE)
    first, stop = row, row
    for masked in tl.static_range(2):
        if masked:  # not before: registers are short among the full blocks
            first, stop = ends_of(row, keys, first_ptr, stop_ptr, first_shift, stop_shift, queries, VECTORS)
        dk, dv = _dkdv_blocks(
            dk,
            dv,
            k,
            v,
            k_block,
            v_block,
            inside,
            q_ptr,
            dout_ptr,
            exponent_ptr,
            delta_ptr,
            q_row,
            q_head,
            dout_row,
            dout_head,
            q_blocks,
            dout_blocks,
            batch_index,
            group_index,
            share,
            first_a,
            head_blocks,
            middle_blocks,
            head_blocks + tail_blocks if masked else middle_blocks,
            queries,
            first,
            stop,
            scale,
            softcap,
            K,
            V,
            PADDED_K,
            PADDED_V,
            BLOCK_M,
            EDGE,
            SOFTCAP,
            DESCRIPTORS,
            masked == 1,
        )
    row, inside = rows_again(begin, keys, BLOCK_N)
    dk_ptr += batch * dk_batch + group * dk_head
    dv_ptr += batch * dv_batch + group * dv_head
    write(dv_ptr, row, dv_row, inside, dv, V, PADDED_V, False)
    write(dk_ptr, row, dk_row, inside, dk * out_scale, K, PADDED_K, ACCUMULATE)
