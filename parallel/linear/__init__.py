"""Linear mixers over a sequence that is spread over the ranks of a group: one scan for all of them.

    calls         the public functions and their checks
    operators     the registered operator pairs, with the handshake
    engine        a rank's forward and backward: sum up its runs, learn what enters them, compute the outputs
    mixers        what differs between the mixers: their passes on one device, and what takes a state through a run
    ..scan        which runs follow one another, and how summaries are combined (one folder up)
    allgather, alltoall, chain    how summaries travel
    ulysses       tokens travel instead, for heads
    cost          which strategy runs, and the model that "auto" asks

Letters: B batch, T_w tokens on this rank, H heads, G heads of q and k, K query/key width, V value width, M slots, W
ranks, R the most runs of any rank, N segments on this rank. The state dtype is float32 (float64 for float64 inputs).
"""

from longtrain.parallel.linear.calls import (
    sequence_parallel_delta_rule,
    sequence_parallel_linear_attention,
    sequence_parallel_slot_attention,
)
from longtrain.parallel.linear.cost import explain_linear_attention

__all__ = [
    "explain_linear_attention",
    "sequence_parallel_delta_rule",
    "sequence_parallel_linear_attention",
    "sequence_parallel_slot_attention",
]
