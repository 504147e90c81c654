# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""Triton kernels that carry a state along tokens: what parts sum up to, the scan over parts, and the sweep.

With the letters of `decays.py`, three tensors a, b [.., A] and c [.., OUT] of tokens, and a state Z [A, OUT] that is
held in float32 registers, one sweep is, chunk by chunk,

    forward:  o_i = f (e^{prefix_i} a_i Z + sum_{j<=i} (a_i . b_j) e^{between_ij} c_j)
              Z  <- e^{total} Z + b^T (e^{suffix} c)
    reverse:  o_j = e^{suffix_j} a_j Z + f sum_{i>=j} (a_j . b_i) e^{between_ij} c_i
              Z  <- e^{total} Z + f b^T (e^{prefix} c)

with f the scale, and every pass over scalar decays is such a sweep:

    out   forward   a = q,  b = k,  c = v    Z = S         dq   forward   a = do, b = v,  c = k    Z = S^T
    dv    reverse   a = k,  b = q,  c = do   Z = D         dk   reverse   a = v,  b = do, c = q    Z = D^T

(S the state, D its gradient; dk and dv go together, in `triton_backward.py`). With decays per channel
q and k come with their factors in them and scores are read (`triton_channels.py`).

A program walks one part (`plan.py`) of one head. A masked score is 0, and 0 * NaN is NaN: so a NaN or inf in b or c
would reach all tokens of its chunk, and not only those that see it. Each program flags whether all that it computed is
finite, which costs one product per number; where it is not, `triton_tokens.py` computes its part again.

"Gated Linear Attention Transformers with Hardware-Efficient Training"
(Yang et al. 2024, section 4); "Various Lengths, Constant Speed" (Qin et al. 2024, equations 9 to 16).
"""

import triton
import triton.language as tl

NONE: tl.constexpr = tl.constexpr(0)  # the forms of decay
HEAD: tl.constexpr = tl.constexpr(1)
TOKEN: tl.constexpr = tl.constexpr(2)
CHANNEL: tl.constexpr = tl.constexpr(3)
# exp of it is below what float32 can hold beside numbers that have not decayed: such a token forgets everything.
STRONGEST: tl.constexpr = tl.constexpr(-80.0)


@triton.jit
def load_rows(x, stride, rows, stop, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """Tokens `rows` [R] of x, columns [BLOCK], as [R, BLOCK]; zeros from token `stop` on and beyond WIDTH."""
    seen = (rows < stop)[:, None]
    if WIDTH % BLOCK:
        seen = seen & (columns < WIDTH)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(at, mask=seen, other=0).to(TYPE)


@triton.jit
def store_rows(x, stride, rows, stop, columns, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The reverse of `load_rows`."""
    seen = (rows < stop)[:, None]
    if WIDTH % BLOCK:
        seen = seen & (columns < WIDTH)[None, :]
    at = x + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=seen)


@triton.jit
def finite(x):
    """x with zeros for what is not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def times_state(x, starts, seen, columns, WIDTH: tl.constexpr, state, C: tl.constexpr, BO: tl.constexpr):
    """Rows of x, which begin at `starts` [C], times a state [BLOCK, BO] in float32, one row after another.

    In full float32 a product of matrices keeps all that a thread multiplies in registers: a state is too wide for it.
    """
    i = tl.arange(0, C)
    found = tl.zeros((C, BO), tl.float32)
    for n in range(C):
        start = tl.sum(tl.where(i == n, starts, 0), 0)
        there = tl.sum(tl.where((i == n) & seen, 1, 0), 0) > 0
        row = tl.load(x + start + columns, mask=there & (columns < WIDTH), other=0).to(tl.float32)
        found = tl.where(i[:, None] == n, tl.sum(row[:, None] * state, 0)[None, :], found)
    return found


@triton.jit
def without_diagonal(score, C: tl.constexpr):
    """The diagonal [C] of scores [C, C], and the scores with zeros there."""
    diagonal = tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :]
    own = tl.sum(tl.where(diagonal, score, 0.0), 1)
    return own, tl.where(diagonal, 0.0, score)


@triton.jit
def load_scores(scores, rows, stop, heads, REVERSE: tl.constexpr, C: tl.constexpr):
    """Scores of the tokens that read [C, C], [i, j], in reverse as [j, i]; float32."""
    steps = tl.arange(0, C)
    if REVERSE:
        to = scores + rows[None, :].to(tl.int64) * heads * C + steps[:, None]
    else:
        to = scores + rows[:, None].to(tl.int64) * heads * C + steps[None, :]
    return tl.load(to, mask=(rows < stop)[:, None] & (rows < stop)[None, :], other=0).to(tl.float32)


@triton.jit
def state_cells(row, a, out, TRANSPOSED: tl.constexpr, A: tl.constexpr, OUT: tl.constexpr):
    """Where the numbers of state number `row` lie, [a, out], in states [A, OUT] or, TRANSPOSED, [OUT, A]."""
    if TRANSPOSED:
        cells = row * A * OUT + out[None, :] * A + a[:, None]
    else:
        cells = row * A * OUT + a[:, None] * OUT + out[None, :]
    return cells


@triton.jit
def powers(steps, g):
    """steps * g, where 0 steps are no decay even of -inf."""
    return tl.where(steps > 0, steps * g, 0.0)


@triton.jit
def decay_sums(log, stride, g, start, stop, DECAY: tl.constexpr, C: tl.constexpr):
    """(prefix [C], suffix [C], total) of the chunk at `start`: sums of their own terms, so -inf is as good as any."""
    steps = tl.arange(0, C)
    if DECAY == HEAD:
        tokens = tl.minimum(stop - start, C)
        prefix = powers((steps + 1).to(tl.float32), g)
        suffix = powers((tokens - 1 - steps).to(tl.float32), g)
        total = powers(tokens.to(tl.float32), g)
    else:
        at = log + (start + steps).to(tl.int64) * stride
        own = tl.load(at, mask=start + steps < stop, other=0).to(tl.float32)
        after = tl.load(at + stride, mask=(start + steps + 1 < stop) & (steps + 1 < C), other=0).to(tl.float32)
        prefix = tl.cumsum(own, 0)
        suffix = tl.cumsum(after, 0, reverse=True)
        total = tl.sum(own, 0)
    return prefix, suffix, total


@triton.jit
def decay_between(
    log, stride, g, start, stop, DECAY: tl.constexpr, COLUMNS_READ: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr
):
    """exp(between) [C, C], 0 where the writing token comes after the reading one.

    Rows read what columns wrote, or with COLUMNS_READ the reverse. Per token it is a difference of running sums, from
    which tokens that forget everything are left out and only counted; with WIDE it is done in float64.
    """
    steps = tl.arange(0, C)
    # This is 0, for no chunk is empty. The compiler cannot know, and so does not keep [C, C] registers for all chunks.
    distance = tl.minimum(stop - start, 0)
    if COLUMNS_READ:
        distance += steps[None, :] - steps[:, None]
    else:
        distance += steps[:, None] - steps[None, :]
    if DECAY == NONE or DECAY == HEAD:  # without a decay g is 0
        between = powers(distance.to(tl.float32), g)
        decay = tl.exp(tl.where(distance >= 0, between, float("-inf")))
    else:
        at = log + (start + steps).to(tl.int64) * stride
        own = tl.load(at, mask=start + steps < stop, other=0).to(tl.float32)
        forgets = own < STRONGEST
        resets = tl.cumsum(forgets.to(tl.int32), 0)
        own = tl.where(forgets, 0.0, own)
        if WIDE:
            own = own.to(tl.float64)
        sums = tl.cumsum(own, 0)
        if COLUMNS_READ:
            between = sums[None, :] - sums[:, None]
        else:
            between = sums[:, None] - sums[None, :]
        seen = (distance >= 0) & (resets[:, None] == resets[None, :])
        between = between.to(tl.float32)
        between = tl.where(between > 0, 0.0, between)  # and not `minimum`, which hides a NaN
        decay = tl.exp(tl.where(seen, between, float("-inf")))
    return decay


@triton.jit
def part_states(
    b, c, log, totals, added, logs, parts, listed,
    batch_b, token_b, head_b, batch_c, token_c, head_c, share_b, share_c,
    heads, tokens, count, listed_count, chunks, factor,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What listed parts reach from a zero state, added [B, P, H, K, V]; their log transitions logs [B, P, H, 1 or K].

    Reads b [.., K] and c [.., V] once for each block of the other: k and v; or, in reverse, q and do with `factor`.
    log: [H] or [B, T, H]; totals [B, M, H, K], with decays per channel, whose factors b has in it.
    """
    kb = tl.program_id(0) % tl.cdiv(K, BK)
    rest = tl.program_id(0) // tl.cdiv(K, BK)
    vb = rest % tl.cdiv(V, BV)
    rest = rest // tl.cdiv(V, BV)
    part = tl.load(listed + rest % listed_count)
    batch = (rest // listed_count // heads).to(tl.int64)
    head = rest // listed_count % heads
    start, stop, first_chunk = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1), tl.load(parts + 4 * part + 3)
    b += batch * batch_b + (head // share_b).to(tl.int64) * head_b
    c += batch * batch_c + (head // share_c).to(tl.int64) * head_c
    g = 0.0
    if DECAY == HEAD:
        g = tl.load(log + head).to(tl.float32)
    elif DECAY == TOKEN:
        log += batch * tokens * heads + head
    steps, k, v = tl.arange(0, C), kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    if DECAY == CHANNEL:
        totals += (batch * chunks + first_chunk) * heads * K + head * K + k
    log_sum = tl.zeros((BK,), tl.float32)
    state = tl.zeros((BK, BV), tl.float32)
    n = tl.cdiv(stop - start, C)
    for m in range(n):
        chunk = m
        if REVERSE:
            chunk = n - 1 - m
        at = start + chunk * C
        b_rows = load_rows(b, token_b, at + steps, stop, k, K, BK, TYPE)
        c_rows = load_rows(c, token_c, at + steps, stop, v, V, BV, TYPE)
        if DECAY == CHANNEL:
            to = totals + ((at - start) // C).to(tl.int64) * heads * K
            total = tl.load(to, mask=k < K, other=0)
            log_sum += total
            state *= tl.exp(total)[:, None]
        elif DECAY != NONE:
            prefix, suffix, total = decay_sums(log, heads, g, at, stop, DECAY, C)
            log_sum += total
            state *= tl.exp(total)
            if REVERSE:
                suffix = prefix
            c_rows = (c_rows.to(tl.float32) * (tl.exp(suffix) * factor)[:, None]).to(TYPE)
        state = tl.dot(tl.trans(b_rows), c_rows, acc=state, input_precision=PRECISION)
    if DECAY == NONE:
        state *= factor
    row = (batch * count + part) * heads + head
    to = added + row * K * V + k[:, None] * V + v[None, :]
    tl.store(to, state, mask=(k < K)[:, None] & (v < V)[None, :])
    if vb == 0:
        if DECAY == CHANNEL:
            tl.store(logs + row * K + k, log_sum, mask=k < K)
        elif DECAY != NONE:
            tl.store(logs + row + tl.arange(0, BK), log_sum, mask=(tl.arange(0, BK) == 0) & (kb == 0))


@triton.jit
def carry(
    added, logs, initial, entering, final, final_logs, first, heads, segments, count,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The scan over the parts of each segment: Z <- e^{log} Z + added, from `initial` (None: zeros).

    entering [B, P, H, K, V]: Z before each part (None: not asked for). final [B, N, H, K, V] and final_logs
    [B, N, H, 1 or K]: after the last part, and the sums of logs; None: not asked for, and then the last part's `added`
    and `logs`, which nobody computed, are not read. In reverse, the first part is the last one.
    """
    kb = tl.program_id(0) % tl.cdiv(K, BK)
    rest = tl.program_id(0) // tl.cdiv(K, BK)
    vb = rest % tl.cdiv(V, BV)
    rest = rest // tl.cdiv(V, BV)
    segment = rest % segments
    batch = (rest // segments // heads).to(tl.int64)
    head = rest // segments % heads
    k, v = kb * BK + tl.arange(0, BK), vb * BV + tl.arange(0, BV)
    inside = (k < K)[:, None] & (v < V)[None, :]
    cell = k[:, None] * V + v[None, :]
    segment_row = (batch * segments + segment) * heads + head
    state = tl.zeros((BK, BV), tl.float32)
    if initial is not None:
        state = tl.load(initial + segment_row * K * V + cell, mask=inside, other=0)
    log_sum = tl.zeros((BK,), tl.float32)
    begin, end = tl.load(first + segment), tl.load(first + segment + 1)
    for n in range(end - begin):
        part = begin + n
        if REVERSE:
            part = end - 1 - n
        row = (batch * count + part) * heads + head
        if entering is not None:
            tl.store(entering + row * K * V + cell, state, mask=inside)
        known = k < K
        if final is None:
            known = known & (n + 1 < end - begin)
        if DECAY == CHANNEL:
            log = tl.load(logs + row * K + k, mask=known, other=0)
            log_sum += log
            state *= tl.exp(log)[:, None]
        elif DECAY != NONE:
            log = tl.load(logs + row + 0 * k, mask=known, other=0)
            log_sum += log
            state *= tl.exp(log)[:, None]
        state += tl.load(added + row * K * V + cell, mask=known[:, None] & inside, other=0)
    if final is not None:
        tl.store(final + segment_row * K * V + cell, state, mask=inside)
        if final_logs is not None:
            if vb == 0:
                if DECAY == CHANNEL:
                    tl.store(final_logs + segment_row * K + k, log_sum, mask=k < K)
                else:
                    tl.store(final_logs + segment_row + 0 * k, log_sum, mask=k == 0)


@triton.jit
def walk(
    program, a, b, c, out, scores, log, totals, entering, leaving, parts, through, within, other, flags,
    batch_a, token_a, head_a, batch_b, token_b, head_b, batch_c, token_c, head_c, batch_x, token_x, head_x,
    share_a, share_b, share_c, share_x, heads, batches, tokens, count, chunks, factor,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, A: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
    BY_ROWS: tl.constexpr,
):  # fmt: skip
    """One program's part of the sweep of the module's docstring: out [B, T, H, OUT].

    entering [B, P, H, K, V], the states before parts (None: zeros), which are Z or, TRANSPOSED, Z^T; leaving, alike,
    those after them (None: not asked for). through and within [blocks of OUT, B, T, H], where given: other . o as far
    as o came through the state, and from other tokens of the chunk. With decays per channel: totals [B, M, H, K], and
    scores [B, T, H, C] (None: o is what comes through the state alone). flags [programs], where given: 0, or NaN where
    any of o is not finite. BY_ROWS: products with Z go by `times_state`.
    """
    ob = program % tl.cdiv(OUT, BO)
    rest = program // tl.cdiv(OUT, BO)
    part = rest % count
    batch = (rest // count // heads).to(tl.int64)
    head = rest // count % heads
    start, stop, first_chunk = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1), tl.load(parts + 4 * part + 3)
    a += batch * batch_a + (head // share_a).to(tl.int64) * head_a
    b += batch * batch_b + (head // share_b).to(tl.int64) * head_b
    c += batch * batch_c + (head // share_c).to(tl.int64) * head_c
    out += (batch * tokens * heads + head) * OUT
    steps, ka, ko = tl.arange(0, C), tl.arange(0, BA), ob * BO + tl.arange(0, BO)
    g = 0.0
    if DECAY == HEAD:
        g = tl.load(log + head).to(tl.float32)
    elif DECAY == TOKEN:
        log += batch * tokens * heads + head
    elif DECAY == CHANNEL:
        if TRANSPOSED:
            totals += ((batch * chunks + first_chunk) * heads + head) * OUT + ko
        else:
            totals += ((batch * chunks + first_chunk) * heads + head) * A + ka
        if scores is not None:
            scores += (batch * tokens * heads + head) * C
    if through is not None:
        other += batch * batch_x + (head // share_x).to(tl.int64) * head_x
        through += (ob.to(tl.int64) * batches + batch) * tokens * heads + head
        within += (ob.to(tl.int64) * batches + batch) * tokens * heads + head
    row = (batch * count + part) * heads + head
    cell = state_cells(row, ka, ko, TRANSPOSED, A, OUT)
    inside = (ka < A)[:, None] & (ko < OUT)[None, :]
    state = tl.zeros((BA, BO), tl.float32)
    if entering is not None:
        state = tl.load(entering + cell, mask=inside, other=0)
    broken = tl.zeros((C,), tl.float32)
    n = tl.cdiv(stop - start, C)
    for m in range(n):
        chunk = m
        if REVERSE:
            chunk = n - 1 - m
        at = start + chunk * C
        rows = at + steps
        a_rows = load_rows(a, token_a, rows, stop, ka, A, BA, TYPE)
        b_rows = load_rows(b, token_b, rows, stop, ka, A, BA, TYPE)
        c_rows = load_rows(c, token_c, rows, stop, ko, OUT, BO, TYPE)
        c_written = c_rows
        if BY_ROWS:
            o = times_state(a, rows.to(tl.int64) * token_a, rows < stop, ka, A, state, C, BO)
        else:
            o = tl.dot(a_rows, state.to(TYPE), input_precision=PRECISION)
        if DECAY == CHANNEL:
            if scores is not None:
                score = load_scores(scores, rows, stop, heads, REVERSE, C)
            chunk_totals = totals + chunk.to(tl.int64) * heads * (OUT if TRANSPOSED else A)
            if TRANSPOSED:
                state *= tl.exp(tl.load(chunk_totals, mask=ko < OUT, other=0))[None, :]
            else:
                state *= tl.exp(tl.load(chunk_totals, mask=ka < A, other=0))[:, None]
        else:
            score = tl.dot(a_rows, tl.trans(b_rows), input_precision=PRECISION)
            score *= decay_between(log, heads, g, at, stop, DECAY, REVERSE, WIDE, C) * factor
            if DECAY == NONE:
                if REVERSE:
                    c_written = (c_rows.to(tl.float32) * factor).to(TYPE)
                else:
                    o *= factor
            else:
                prefix, suffix, total = decay_sums(log, heads, g, at, stop, DECAY, C)
                if REVERSE:
                    o *= tl.exp(suffix)[:, None]
                    written = tl.exp(prefix) * factor
                else:
                    o *= (tl.exp(prefix) * factor)[:, None]
                    written = tl.exp(suffix)
                c_written = (c_rows.to(tl.float32) * written[:, None]).to(TYPE)
                state *= tl.exp(total)
        if DECAY != CHANNEL or scores is not None:
            if through is not None:  # a token's own share apart from that of the others
                own, score = without_diagonal(score, C)
                others = tl.dot(score.to(TYPE), c_rows, input_precision=PRECISION)
                x = load_rows(other, token_x, rows, stop, ko, OUT, BO, tl.float32)
                tl.store(through + rows.to(tl.int64) * heads, tl.sum(o * x, 1), mask=rows < stop)
                tl.store(within + rows.to(tl.int64) * heads, tl.sum(others * x, 1), mask=rows < stop)
                o += others + own[:, None] * c_rows.to(tl.float32)
            else:
                o = tl.dot(score.to(TYPE), c_rows, acc=o, input_precision=PRECISION)
            broken += tl.sum(o * 0.0, 1)
        state = tl.dot(tl.trans(b_rows), c_written, acc=state, input_precision=PRECISION)
        store_rows(out, heads * OUT, rows, stop, ko, o, OUT, BO)
    if leaving is not None:
        tl.store(leaving + cell, state, mask=inside)
    if flags is not None:
        tl.store(flags + program, tl.sum(broken, 0))


@triton.jit
def sweep(
    a, b, c, out, scores, log, totals, entering, leaving, parts, through, within, other, flags,
    batch_a, token_a, head_a, batch_b, token_b, head_b, batch_c, token_c, head_c, batch_x, token_x, head_x,
    share_a, share_b, share_c, share_x, heads, batches, tokens, count, chunks, factor,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr, A: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
    BY_ROWS: tl.constexpr,
):  # fmt: skip
    """`walk` over every part and block of columns of every head."""
    walk(
        tl.program_id(0), a, b, c, out, scores, log, totals, entering, leaving, parts, through, within, other, flags,
        batch_a, token_a, head_a, batch_b, token_b, head_b, batch_c, token_c, head_c, batch_x, token_x, head_x,
        share_a, share_b, share_c, share_x, heads, batches, tokens, count, chunks, factor,
        REVERSE, DECAY, TYPE, PRECISION, WIDE, TRANSPOSED, A, OUT, C, BA, BO, BY_ROWS,
    )  # fmt: skip
