# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
"""Triton kernels of the gated delta rule: the gradients of a chunk's inputs, once states and their gradients are known.

With R solving (I + diag(beta) A)^T R = dU:

    dv = beta R,   dA = -beta R U^T,   dP = scale dO U^T,   dbeta = R . V - R U^T . A - (R S^T) . (K exp(prefix))

(the dots row by row), and then of q, k and the log-decays by the chain rule: A and P are products of q and k with
factors of the decays, and so is what meets the states before and after. Each program writes what is its own; blocks of
keys that share a number (dbeta, and the gradient of a decay per head) write parts, which are added up in order
afterwards. Layout, GATE and what becomes of NaN and inf as in `triton_prepare.py`; what is taken out of q and k here
still reaches its gradients by way of R and U.
"""

import triton
import triton.language as tl

from longtrain.kernels.gated_delta_rule.triton_prepare import (
    chunk_rows,
    exp_between,
    join_halves,
    load_block,
    meet,
    reaches_back,
    store_block,
)
from longtrain.kernels.linear_attention.triton_forward import finite


@triton.jit
def pair_gradients_kernel(
    v,
    rates,
    log_decay,
    chunks,
    inverse,
    a,
    p,
    u,
    dout,
    du,  # overwritten by R
    dv,
    da,  # for GATE 0 and 1 with exp(between) in it, and so dp
    dp,
    dbeta,  # part 0
    dlog,  # for GATE 1 part 0, otherwise None
    scale,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R, dv, dA, dP, and what comes of them alone. Grid (chunks, H)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    i = tl.arange(0, C)
    factors = tl.load(rates + own, mask=live, other=0.0)
    solver = tl.trans(load_block(inverse, own * C, live, i, C))
    r_u = tl.zeros((C, C), tl.float32)
    d_p = tl.zeros((C, C), tl.float32)
    d_beta = tl.zeros((C,), tl.float32)
    for first in range(0, V, BV):
        values = first + tl.arange(0, BV)
        right = load_block(du, own * V, live, values, V)
        r = tl.dot(solver, finite(right), input_precision=PRECISION)
        r = tl.where(reaches_back(right, factors, C)[:, None], float("nan"), r)
        store_block(du, own * V, live, values, V, r)
        store_block(dv, own * V, live, values, V, r * factors[:, None])
        d_beta += tl.sum(r * load_block(v, own * V, live, values, V), 1)
        stored = tl.trans(load_block(u, own * V, live, values, V))
        r_u = tl.dot(r.to(stored.dtype), stored, r_u, input_precision=PRECISION)
        d_p = tl.dot(load_block(dout, own * V, live, values, V), stored, d_p, input_precision=PRECISION)
    a_block = load_block(a, own * C, live, i, C)
    d_beta -= tl.sum(tl.where(i[:, None] > i[None, :], r_u * a_block, 0.0), 1)
    tl.store(dbeta + own, d_beta, mask=live)
    d_a = tl.where(i[:, None] > i[None, :], -factors[:, None] * r_u, 0.0)
    d_p = tl.where(i[:, None] >= i[None, :], d_p * scale, 0.0)
    if GATE == 1:
        g = tl.load(log_decay + own, mask=live, other=0.0)
        if dlog is not None:
            # Token t's g is in between_ij for j < t <= i.
            cross = tl.where(i[:, None] > i[None, :], d_p * load_block(p, own * C, live, i, C) + d_a * a_block, 0.0)
            later = tl.cumsum(cross, 0, reverse=True)
            tl.store(dlog + own, tl.sum(tl.where(i[:, None] > i[None, :], later, 0.0), 1), mask=live)
        between = exp_between(g, C)
        d_a, d_p = d_a * between, d_p * between
    store_block(da, own * C, live, i, C, d_a)
    store_block(dp, own * C, live, i, C, d_p)


@triton.jit
def _from_states(
    states, dstates, dout, r, u, own, live, keys, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S^T, R S^T and U D'^T [C, BK], and the sum of S D' over values [BK]; states at this chunk and head."""
    d_read = tl.zeros((C, BK), tl.float32)
    d_erased = tl.zeros((C, BK), tl.float32)
    d_written = tl.zeros((C, BK), tl.float32)
    d_total = tl.zeros((BK,), tl.float32)
    for first in range(0, V, BV):
        values = first + tl.arange(0, BV)
        before = load_block(states, keys.to(tl.int64) * V, keys < K, values, V)
        after = load_block(dstates, keys.to(tl.int64) * V, keys < K, values, V)
        d_total += tl.sum(before.to(tl.float32) * after.to(tl.float32), 1)
        before, after = tl.trans(before), tl.trans(after)
        d_read = tl.dot(load_block(dout, own * V, live, values, V), before, d_read, input_precision=PRECISION)
        d_erased = tl.dot(load_block(r, own * V, live, values, V), before, d_erased, input_precision=PRECISION)
        d_written = tl.dot(load_block(u, own * V, live, values, V), after, d_written, input_precision=PRECISION)
    return d_read, d_erased, d_written, d_total


@triton.jit
def input_gradients_kernel(
    q,
    k,
    rates,
    from_start,  # None unless GATE 1
    to_end,
    through,
    chunks,
    states,
    dstates,
    dout,
    r,
    u,
    da,
    dp,
    dq,  # [rows, H, K], and so dk
    dk,
    dbeta,  # [1 + blocks of K, rows, H]
    dlog,  # for GATE 1 [1 + blocks of K, rows, H], otherwise None
    parts,  # rows * H
    scale,
    H: tl.constexpr,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,  # 0 or 1
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk, and parts of dbeta and of the gradient of log-decays per head. Grid (chunks, H, blocks of K)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    part = (1 + tl.program_id(2)).to(tl.int64) * parts
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    i = tl.arange(0, C)
    keys = tl.program_id(2) * BK + tl.arange(0, BK)
    state = (chunk.to(tl.int64) * H + head) * K * V
    d_read, d_erased, d_written, d_total = _from_states(
        states + state, dstates + state, dout, r, u, own, live, keys, V, C, BK, BV, K, PRECISION
    )
    q_block = finite(load_block(q, (rows * GQ + head // (H // GQ)) * K, live, keys, K))
    k_block = finite(load_block(k, (rows * GK + head // (H // GK)) * K, live, keys, K))
    factors = tl.load(rates + own, mask=live, other=0.0)
    d_read *= scale
    if GATE == 1:
        prefix = tl.load(from_start + own, mask=live, other=0.0)
        suffix = tl.load(to_end + own, mask=live, other=0.0)
        d_read, d_erased, d_written = d_read * prefix[:, None], d_erased * prefix[:, None], d_written * suffix[:, None]
    tl.store(dbeta + part + own, -tl.sum(d_erased * k_block, 1), mask=live)
    d_erased *= -factors[:, None]
    if dlog is not None:
        d_prefix = tl.sum(d_read * q_block + d_erased * k_block, 1)
        d_suffix = tl.sum(d_written * k_block, 1)
        d_log = tl.sum(tl.where(i[:, None] <= i[None, :], d_prefix[None, :], 0.0), 1)
        d_log += tl.sum(tl.where(i[:, None] > i[None, :], d_suffix[None, :], 0.0), 1)
        d_log += tl.sum(d_total, 0) * tl.load(through + chunk * H + head)
        tl.store(dlog + part + own, d_log, mask=live)
    d_p, d_a = load_block(dp, own * C, live, i, C), load_block(da, own * C, live, i, C)
    d_q = tl.dot(d_p, k_block, d_read, input_precision=PRECISION)
    d_k = tl.dot(d_a, k_block, d_erased + d_written, input_precision=PRECISION)
    d_k = tl.dot(tl.trans(d_a), k_block, d_k, input_precision=PRECISION)
    d_k = tl.dot(tl.trans(d_p), q_block, d_k, input_precision=PRECISION)
    store_block(dq, own * K, live, keys, K, d_q)
    store_block(dk, own * K, live, keys, K, d_k)


@triton.jit
def channel_gradients_kernel(
    q,
    k,
    rates,
    log_decay,
    chunks,
    states,
    dstates,
    dout,
    r,
    u,
    da,
    dp,
    dq,  # [rows, H, K], and so dk and dlog
    dk,
    dbeta,  # [1 + blocks of K, rows, H]
    dlog,
    parts,  # rows * H
    scale,
    H: tl.constexpr,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,  # log2(C)
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`input_gradients_kernel` for decays per channel. Grid (chunks, H, blocks of K)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    part = (1 + tl.program_id(2)).to(tl.int64) * parts
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    i = tl.arange(0, C)
    keys = tl.program_id(2) * BK + tl.arange(0, BK)
    state = (chunk.to(tl.int64) * H + head) * K * V
    g = load_block(log_decay, own * K, live, keys, K)
    q_block = finite(load_block(q, (rows * GQ + head // (H // GQ)) * K, live, keys, K).to(tl.float32))
    k_block = finite(load_block(k, (rows * GK + head // (H // GK)) * K, live, keys, K).to(tl.float32))
    d_p, d_a = load_block(dp, own * C, live, i, C), load_block(da, own * C, live, i, C)
    # What comes to the query and the key of a token from those before it, and to the latter from the former.
    d_q = tl.zeros((C, BK), tl.float32)
    d_late = tl.zeros((C, BK), tl.float32)
    d_early = tl.zeros((C, BK), tl.float32)
    rise, fall = g, tl.zeros((C, BK), tl.float32)
    for level in range(0, LEVELS):
        half = 1 << level
        met = meet(half, C)
        by_query, by_key = tl.where(met, d_p, 0.0).to(d_p.dtype), tl.where(met, d_a, 0.0).to(d_p.dtype)
        factor, early_factor = tl.exp(rise), tl.exp(fall)
        early = finite(k_block * early_factor).to(d_p.dtype)
        d_q += tl.dot(by_query, early, input_precision=PRECISION) * factor
        d_late += tl.dot(by_key, early, input_precision=PRECISION) * factor
        met_early = tl.dot(tl.trans(by_query), finite(q_block * factor).to(d_p.dtype), input_precision=PRECISION)
        met_early = tl.dot(
            tl.trans(by_key), finite(k_block * factor).to(d_p.dtype), met_early, input_precision=PRECISION
        )
        d_early += met_early * early_factor
        rise, fall = join_halves(rise, fall, half, C, BK)
    d_read, d_erased, d_written, d_total = _from_states(
        states + state, dstates + state, dout, r, u, own, live, keys, V, C, BK, BV, K, PRECISION
    )
    # Token t's g is in between_ij for j < t <= i: all pairs with i >= t but those with j >= t too; or all with j < t
    # but those with i < t too, which is the same, save where one of the two is not finite.
    meeting = q_block * d_q + k_block * (d_late - d_early)
    d_log = tl.cumsum(meeting, 0, reverse=True)
    d_log = tl.where(tl.abs(d_log) < float("inf"), d_log, meeting - tl.cumsum(meeting, 0))
    prefix = tl.exp(rise)
    d_erased *= prefix
    tl.store(dbeta + part + own, -tl.sum(d_erased * k_block, 1), mask=live)
    d_read *= scale * prefix
    d_erased *= -tl.load(rates + own, mask=live, other=0.0)[:, None]
    d_log += tl.cumsum(q_block * d_read + k_block * d_erased, 0, reverse=True)
    d_written *= tl.exp(fall)
    earlier = k_block * d_written
    d_log += tl.cumsum(earlier, 0) - earlier + (d_total * tl.exp(tl.sum(g, 0)))[None, :]
    store_block(dlog, own * K, live, keys, K, d_log)
    alone = tl.sum(tl.where(i[:, None] == i[None, :], d_p.to(tl.float32), 0.0), 1)[:, None]
    store_block(dq, own * K, live, keys, K, d_q + d_read + alone * k_block)
    store_block(dk, own * K, live, keys, K, d_written + d_erased + d_late + d_early + alone * q_block)
