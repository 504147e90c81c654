# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""The kernels for scores of tokens and slots that linear attention does not have; one program for a chunk and head.

With the letters of `torch_impl.py`, for token i of a chunk that state S_m enters

    scores_i = scale * (exp(prefix_i) (S_m q_i) + sum_{j <= i} (q_i . k_j) exp(between_ij) slot_j)

S_m q_i comes from linear attention's sweep, which is given written_j = exp(suffix_j) slot_j. Inside the chunk the decay
stands between the product q_i . k_j and the slot: the chunk is halved again and again as in linear attention's
`triton_channels.py`, so that exp(between_ij) = exp(rise_i) exp(fall_j) with no exponent above 0:

    sum = (q_i . k_i) slot_i + sum over levels of exp(rise_i) sum_j (q_i . k_j) (exp(fall_j) slot_j)
"""

import triton
import triton.language as tl

from longtrain.kernels.linear_attention.triton_channels import sums_of_halves, within_blocks
from longtrain.kernels.linear_attention.triton_forward import finite, load_rows


@triton.jit
def write_slots(
    slot, log, written, totals, chunk_table, batch_s, token_s, head_s, heads, tokens, chunks,
    M: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """written [B, T, H, M] and totals [B, chunks, H, M]; log: [B, T, H, M], contiguous, as the results."""
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    head = tl.program_id(0) // chunks % heads
    at, stop = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    slot += batch * batch_s + head.to(tl.int64) * head_s
    log += (batch * tokens * heads + head) * M
    steps = tl.arange(0, C)
    rows = at + steps
    for first in range(0, M, BM):
        columns = first + tl.arange(0, BM)
        slots = load_rows(slot, token_s, rows, stop, columns, M, BM, tl.float32)
        # The next token's: so the sum behind a token is a sum of its own terms, also where one of them is -inf.
        behind = load_rows(log, heads * M, rows + 1, tl.minimum(stop, at + C), columns, M, BM, tl.float32)
        suffix = tl.cumsum(behind, 0, reverse=True)
        to = written + (batch * tokens * heads + head) * M + rows.to(tl.int64)[:, None] * heads * M + columns[None, :]
        inside = (rows < stop)[:, None] & (columns < M)[None, :]
        tl.store(to, (slots * tl.exp(suffix)).to(written.dtype.element_ty), mask=inside)
        total = tl.sum(load_rows(log, heads * M, rows, stop, columns, M, BM, tl.float32), 0)
        tl.store(totals + ((batch * chunks + chunk) * heads + head) * M + columns, total, mask=columns < M)


@triton.jit
def add_within(
    q, k, slot, log, scores, chunk_table,
    batch_q, token_q, head_q, batch_k, token_k, head_k, batch_s, token_s, head_s, heads, tokens, chunks, scale,
    TYPE: tl.constexpr, PRECISION: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """scores [B, T, H, M], float32, which hold S_m q_i, become the scores; log and scores are contiguous.

    What is not finite among the slots is taken out of the products and put as NaN into the weights of its token, as in
    `triton_channels.gradients_within`. A program has BM slots: in a loop over them the masked pairs of all levels would
    be kept in registers.
    """
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    head = tl.program_id(0) // chunks % heads
    at, stop = tl.load(chunk_table + 2 * chunk), tl.load(chunk_table + 2 * chunk + 1)
    q += batch * batch_q + head.to(tl.int64) * head_q
    k += batch * batch_k + head.to(tl.int64) * head_k
    slot += batch * batch_s + head.to(tl.int64) * head_s
    log += (batch * tokens * heads + head) * M
    scores += (batch * tokens * heads + head) * M
    steps = tl.arange(0, C)
    rows = at + steps
    pairs = tl.zeros((C, C), tl.float32)
    for first in range(0, K, BK):
        columns = first + tl.arange(0, BK)
        q_rows = load_rows(q, token_q, rows, stop, columns, K, BK, TYPE)
        k_rows = load_rows(k, token_k, rows, stop, columns, K, BK, TYPE)
        pairs = tl.dot(q_rows, tl.trans(k_rows), acc=pairs, input_precision=PRECISION)
    diagonal = tl.sum(tl.where(steps[:, None] == steps[None, :], pairs, 0.0), 1)[:, None]
    columns = tl.program_id(1) * BM + tl.arange(0, BM)
    slots = load_rows(slot, token_s, rows, stop, columns, M, BM, tl.float32)
    g = load_rows(log, heads * M, rows, stop, columns, M, BM, tl.float32)
    found = diagonal * slots
    pairs += tl.sum(slots * 0.0, 1)[None, :]  # 0, or NaN
    prefix, suffix = g, tl.zeros((C, BM), tl.float32)
    for level in tl.static_range(LEVELS):
        bit = (((steps >> level) & 1) == 1)[:, None]
        decay = tl.exp(tl.where(bit, prefix, suffix))
        writing = finite(tl.where(bit, 0.0, slots * decay)).to(TYPE)
        weights = tl.where(within_blocks(level, C, False), pairs, 0.0).to(TYPE)
        mixed = tl.dot(weights, writing, input_precision=PRECISION)
        found += tl.where(bit, mixed * decay, 0.0)
        before, behind = sums_of_halves(g, bit, 2**level, C, BM)
        prefix += before
        suffix += behind
    to = scores + rows.to(tl.int64)[:, None] * heads * M + columns[None, :]
    inside = (rows < stop)[:, None] & (columns < M)[None, :]
    through = tl.load(to, mask=inside, other=0) * tl.exp(prefix)
    tl.store(to, (found + through) * scale, mask=inside)
