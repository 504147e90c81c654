# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportOptionalOperand=false
"""Triton kernels of the gated delta rule: states from chunk to chunk, what tokens read from them, and the same back.

    U  = U0 - W S,   S' = exp(total) S + (K exp(suffix))^T U,   O = scale ((Q exp(prefix)) S + P U)
    dU = scale P^T dO + (K exp(suffix)) D',   D = exp(total) D' + scale (Q exp(prefix))^T dO - W^T dU

Only the first two of each line go from chunk to chunk, in one program for each segment, head and block of values, with
the state in registers; they write the states before each chunk (and the gradients of those after each) in the dtype
that matrix products take, so that all else runs for all chunks at once. Layout and GATE as in `triton_prepare.py`;
for GATE 1 the factors of a token multiply the narrower side of a product, for GATE 2 q and k come with theirs.
"""

import triton
import triton.language as tl

from longtrain.kernels.gated_delta_rule.triton_prepare import (
    chunk_rows,
    load_block,
    reaches_back,
    reaches_on,
    store_block,
)
from longtrain.kernels.linear_attention.triton_forward import finite, times_state


@triton.jit
def states_kernel(
    k,  # K exp(suffix) for GATE 2
    w,
    to_end,
    through,
    segments,  # [segments, 3]: first row, tokens, first chunk
    initial,  # [segments, H, K, V] or None
    u,  # U0, overwritten by U where states is not None; None: nothing is stored, as where transitions are wanted
    states,  # [chunks, H, K, V] or None
    final,  # [segments, H, K, V] or None
    H: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    IDENTITY: tl.constexpr,  # start from it: what comes out is the transition
    BK: tl.constexpr,  # >= K
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_ROWS: tl.constexpr,  # products with states go by `times_state`
):
    """From the first chunk of each segment to its last. Grid (segments * H, blocks of V)."""
    segment, head = tl.program_id(0) // H, tl.program_id(0) % H
    first_row = tl.load(segments + 3 * segment).to(tl.int64)
    tokens, first_chunk = tl.load(segments + 3 * segment + 1), tl.load(segments + 3 * segment + 2).to(tl.int64)
    keys, values = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    key_offsets, key_live = keys.to(tl.int64) * V, keys < K
    own_state = program_state(K, V)
    state = tl.zeros((BK, BV), tl.float32)
    if IDENTITY:
        state += (keys[:, None] == values[None, :]).to(tl.float32)
    if initial is not None:
        state += load_block(initial + own_state, key_offsets, key_live, values, V)
    for n in range(0, tl.cdiv(tokens, C)):
        i = n * C + tl.arange(0, C)
        rows, live = first_row + i, i < tokens
        own = rows * H + head
        narrow = state.to(w.dtype.element_ty)
        if states is not None:
            place = states + ((first_chunk + n) * H + head) * K * V
            store_block(place, key_offsets, key_live, values, V, narrow)
        if BY_ROWS:
            stored = -times_state(w, own * K, live, keys, K, state, C, BV)
        else:
            stored = -tl.dot(load_block(w, own * K, live, keys, K), narrow, input_precision=PRECISION)
        if u is not None:
            stored += load_block(u, own * V, live, values, V)
            if states is not None:
                store_block(u, own * V, live, values, V, stored)
        if GATE == 1:
            stored *= tl.load(to_end + own, mask=live, other=0.0)[:, None]
            state *= tl.load(through + (first_chunk + n) * H + head)
        if GATE == 2:
            total = tl.load(through + ((first_chunk + n) * H + head) * K + keys, mask=key_live, other=0.0)
            state *= total[:, None]
        k_block = load_block(k, (rows * GK + head // (H // GK)) * K, live, keys, K)
        state = tl.dot(tl.trans(k_block), stored.to(k_block.dtype), state, input_precision=PRECISION)
    if final is not None:
        store_block(final + own_state, key_offsets, key_live, values, V, state)


@triton.jit
def program_state(K: tl.constexpr, V: tl.constexpr):
    """Where the state of this program's segment and head begins in [segments, H, K, V]."""
    return tl.program_id(0).to(tl.int64) * K * V


@triton.jit
def outputs_kernel(
    q,  # Q exp(prefix) for GATE 2
    p,
    from_start,
    chunks,
    states,
    u,
    out,
    scale,
    H: tl.constexpr,
    GQ: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O. Grid (chunks, H, blocks of V)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    state = states + (chunk.to(tl.int64) * H + head) * K * V
    result = tl.zeros((C, BV), tl.float32)
    for first in range(0, K, BK):
        keys = first + tl.arange(0, BK)
        q_block = load_block(q, (rows * GQ + head // (H // GQ)) * K, live, keys, K)
        block = load_block(state, keys.to(tl.int64) * V, keys < K, values, V)
        result = tl.dot(q_block, block, result, input_precision=PRECISION)
    if GATE == 1:
        result *= tl.load(from_start + own, mask=live, other=0.0)[:, None]
    within = load_block(p, own * C, live, tl.arange(0, C), C)
    stored = load_block(u, own * V, live, values, V)
    result = tl.dot(within, finite(stored), result, input_precision=PRECISION)
    result = tl.where(reaches_on(stored, C)[:, None], float("nan"), result)
    store_block(out, own * V, live, values, V, result * scale)


@triton.jit
def dvalues_kernel(
    p,
    chunks,
    dout,
    du,
    scale,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale P^T dO: the gradient of what is stored, from the chunk's own tokens. Grid (chunks, H, blocks of V)."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    rows, live = chunk_rows(chunks, chunk, C)
    own = rows * H + head
    values = tl.program_id(2) * BV + tl.arange(0, BV)
    within = load_block(p, own * C, live, tl.arange(0, C), C)
    gradient = load_block(dout, own * V, live, values, V)
    result = tl.dot(tl.trans(within), finite(gradient), input_precision=PRECISION) * scale
    reached = reaches_back(gradient, tl.zeros((C,), tl.float32), C)
    store_block(du, own * V, live, values, V, tl.where(reached[:, None], float("nan"), result))


@triton.jit
def dstates_kernel(
    q,  # Q exp(prefix) and K exp(suffix) for GATE 2
    k,
    w,
    from_start,
    to_end,
    through,
    segments,
    dfinal,  # [segments, H, K, V] or None
    dout,
    du,  # scale P^T dO, overwritten by dU where dstates is not None
    dstates,  # [chunks, H, K, V] or None: the gradients of the states after each chunk
    dinitial,  # [segments, H, K, V] or None
    scale,
    H: tl.constexpr,
    GQ: tl.constexpr,
    GK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    GATE: tl.constexpr,
    BK: tl.constexpr,  # >= K
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_ROWS: tl.constexpr,  # products with states go by `times_state`
):
    """From the last chunk of each segment to its first. Grid (segments * H, blocks of V)."""
    segment, head = tl.program_id(0) // H, tl.program_id(0) % H
    first_row = tl.load(segments + 3 * segment).to(tl.int64)
    tokens, first_chunk = tl.load(segments + 3 * segment + 1), tl.load(segments + 3 * segment + 2).to(tl.int64)
    keys, values = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    key_offsets, key_live = keys.to(tl.int64) * V, keys < K
    own_state = program_state(K, V)
    dstate = tl.zeros((BK, BV), tl.float32)
    if dfinal is not None:
        dstate += load_block(dfinal + own_state, key_offsets, key_live, values, V)
    chunks = tl.cdiv(tokens, C)
    for step in range(0, chunks):
        n = chunks - 1 - step
        i = n * C + tl.arange(0, C)
        rows, live = first_row + i, i < tokens
        own = rows * H + head
        narrow = dstate.to(w.dtype.element_ty)
        if dstates is not None:
            place = dstates + ((first_chunk + n) * H + head) * K * V
            store_block(place, key_offsets, key_live, values, V, narrow)
        k_rows = (rows * GK + head // (H // GK)) * K
        if BY_ROWS:
            dstored = times_state(k, k_rows, live, keys, K, dstate, C, BV)
        else:
            dstored = tl.dot(load_block(k, k_rows, live, keys, K), narrow, input_precision=PRECISION)
        dread = load_block(dout, own * V, live, values, V).to(tl.float32) * scale
        if GATE == 1:
            dstored *= tl.load(to_end + own, mask=live, other=0.0)[:, None]
            dstate *= tl.load(through + (first_chunk + n) * H + head)
            dread *= tl.load(from_start + own, mask=live, other=0.0)[:, None]
        if GATE == 2:
            total = tl.load(through + ((first_chunk + n) * H + head) * K + keys, mask=key_live, other=0.0)
            dstate *= total[:, None]
        dstored += load_block(du, own * V, live, values, V)
        if dstates is not None:
            store_block(du, own * V, live, values, V, dstored)
        q_block = load_block(q, (rows * GQ + head // (H // GQ)) * K, live, keys, K)
        dstate = tl.dot(tl.trans(q_block), dread.to(q_block.dtype), dstate, input_precision=PRECISION)
        w_block = load_block(w, own * K, live, keys, K)
        dstate = tl.dot(tl.trans(w_block), (-dstored).to(w_block.dtype), dstate, input_precision=PRECISION)
    if dinitial is not None:
        store_block(dinitial + own_state, key_offsets, key_live, values, V, dstate)
