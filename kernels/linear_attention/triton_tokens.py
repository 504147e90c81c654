# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""The sweeps of `triton_forward.py` token by token: no masks, no products of matrices, so a NaN reaches who sees it.

With a state Z [A, OUT] and g_t the log-decays, one number or one per channel of K (which is A or, TRANSPOSED, OUT),

    forward:  Z <- e^{g_t} Z + b_t c_t^T,          o_t = f a_t Z
    reverse:  Z <- Z + f b_t c_t^T,  o_t = a_t Z,  Z <- e^{g_t} Z

It computes again what a sweep by chunks flags as not finite. And in float32 it computes all for heads wider than 64,
where products of matrices are no faster than their terms and need more registers than there are.
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_forward import CHANNEL, HEAD, NONE, TOKEN, state_cells


@triton.jit
def load_vector(x, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """x[columns] in float32 [BLOCK]; zeros beyond WIDTH."""
    if WIDTH % BLOCK:
        found = tl.load(x + columns, mask=columns < WIDTH, other=0)
    else:
        found = tl.load(x + columns)
    return found.to(tl.float32)


@triton.jit
def sweep_tokens(
    a, b, c, out, log, entering, leaving, parts, through, within, other, flags,
    batch_a, token_a, head_a, batch_b, token_b, head_b, batch_c, token_c, head_c, batch_x, token_x, head_x,
    share_a, share_b, share_c, share_x, heads, batches, tokens, count, factor,
    REVERSE: tl.constexpr, DECAY: tl.constexpr, TRANSPOSED: tl.constexpr, A: tl.constexpr, OUT: tl.constexpr,
    C: tl.constexpr, BA: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The results of `triton_forward.sweep`, from q and k themselves also with decays per channel.

    flags [programs], where given: programs whose number is 0 have nothing to do.
    """
    ob = tl.program_id(0) % tl.cdiv(OUT, BO)
    rest = tl.program_id(0) // tl.cdiv(OUT, BO)
    wanted = 1.0
    if flags is not None:
        wanted = tl.load(flags + tl.program_id(0))
    if wanted != 0:
        part = rest % count
        batch = (rest // count // heads).to(tl.int64)
        head = rest // count % heads
        start, stop = tl.load(parts + 4 * part), tl.load(parts + 4 * part + 1)
        a += batch * batch_a + (head // share_a).to(tl.int64) * head_a
        b += batch * batch_b + (head // share_b).to(tl.int64) * head_b
        c += batch * batch_c + (head // share_c).to(tl.int64) * head_c
        row = batch * tokens * heads + head
        ka, ko = tl.arange(0, BA), ob * BO + tl.arange(0, BO)
        place = (batch * count + part) * heads + head
        cell = state_cells(place, ka, ko, TRANSPOSED, A, OUT)
        inside = (ka < A)[:, None] & (ko < OUT)[None, :]
        if DECAY == HEAD:
            fixed = tl.exp(tl.load(log + head).to(tl.float32))
        state = tl.zeros((BA, BO), tl.float32)
        if entering is not None:
            state = tl.load(entering + cell, mask=inside, other=0)
        if through is not None:
            other += batch * batch_x + (head // share_x).to(tl.int64) * head_x
            block = (ob.to(tl.int64) * batches) * tokens * heads + row
            local = tl.zeros((BA, BO), tl.float32)
        chunks = tl.cdiv(stop - start, C)
        for m in range(chunks):
            chunk = m
            if REVERSE:
                chunk = chunks - 1 - m
            first = start + chunk * C
            last = tl.minimum(first + C, stop) - 1
            if through is not None:  # what a chunk adds joins the state where the next one begins
                state += local
                local = tl.zeros((BA, BO), tl.float32)
            for n in range(last + 1 - first):
                t = first + n
                if REVERSE:
                    t = last - n
                token = t.to(tl.int64)
                at = row + token * heads
                if DECAY == HEAD:
                    decay = fixed
                elif DECAY == TOKEN:
                    decay = tl.exp(tl.load(log + at).to(tl.float32))
                elif DECAY == CHANNEL:
                    if TRANSPOSED:
                        decay = tl.exp(load_vector(log + at * OUT, ko, OUT, BO))[None, :]
                    else:
                        decay = tl.exp(load_vector(log + at * A, ka, A, BA))[:, None]
                a_row = load_vector(a + token * token_a, ka, A, BA)
                b_row = load_vector(b + token * token_b, ka, A, BA)
                c_row = load_vector(c + token * token_c, ko, OUT, BO)
                if REVERSE:
                    b_row *= factor
                else:
                    a_row *= factor
                    if DECAY != NONE:
                        state *= decay
                        if through is not None:
                            local *= decay
                added = b_row[:, None] * c_row[None, :]
                o = tl.sum(a_row[:, None] * state, 0)
                if through is not None:
                    x = load_vector(other + token * token_x, ko, OUT, BO)
                    inner = tl.sum(a_row[:, None] * local, 0)
                    tl.store(through + block + token * heads, tl.sum(o * x, 0))
                    tl.store(within + block + token * heads, tl.sum(inner * x, 0))
                    o += inner
                    local += added
                else:
                    state += added
                o += tl.sum(a_row * b_row, 0) * c_row
                o = o.to(out.dtype.element_ty)
                if OUT % BO:
                    tl.store(out + at * OUT + ko, o, mask=ko < OUT)
                else:
                    tl.store(out + at * OUT + ko, o)
                if REVERSE:
                    if DECAY != NONE:
                        state *= decay
                        if through is not None:
                            local *= decay
        if leaving is not None:
            if through is not None:
                state += local
            tl.store(leaving + cell, state, mask=inside)
