"""A sequence spread over a process group: who holds which tokens, what travels, and operators that run on it.

    shard = SequenceShard(length=T, group=mesh["sequence"], layout="zigzag")   # group=None: this process alone
    out, lse = sequence_parallel_attention(q, k, v, shard)                       # q [B, T_w, H, K]

Functions and shards only; the modules are in `longtrain.layers`.
"""

from longtrain.parallel import picking as picking  # registers operators, as does
from longtrain.parallel import relayouts as relayouts  # what shards call
from longtrain.parallel.attention import sequence_parallel_attention
from longtrain.parallel.attention.cost import Hardware, explain_attention
from longtrain.parallel.balanced import Balanced
from longtrain.parallel.communication import count_messages
from longtrain.parallel.conv1d import sequence_parallel_conv1d
from longtrain.parallel.layouts import BlockCyclic, Contiguous, Layout, Zigzag, layout_named, layout_names
from longtrain.parallel.linear import (
    explain_linear_attention,
    sequence_parallel_delta_rule,
    sequence_parallel_linear_attention,
    sequence_parallel_slot_attention,
)
from longtrain.parallel.mesh import build_mesh, sequence_ranks
from longtrain.parallel.shard import Segment, SequenceShard

__all__ = [
    "Balanced",
    "BlockCyclic",
    "Contiguous",
    "Hardware",
    "Layout",
    "Segment",
    "SequenceShard",
    "Zigzag",
    "build_mesh",
    "count_messages",
    "explain_attention",
    "explain_linear_attention",
    "layout_named",
    "layout_names",
    "sequence_parallel_attention",
    "sequence_parallel_conv1d",
    "sequence_parallel_delta_rule",
    "sequence_parallel_linear_attention",
    "sequence_parallel_slot_attention",
    "sequence_ranks",
]
