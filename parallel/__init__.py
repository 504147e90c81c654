"""A sequence spread over a process group: who holds which tokens, what travels, and operators that run on it.

    shard = SequenceShard(length=T, group=mesh["sequence"], layout="zigzag")   # group=None: this process alone
    out, lse = sequence_parallel_attention(q, k, v, shard)                       # q [B, T_w, H, K]

Functions and shards only; the modules are in `longtrain.layers`.
"""

from longtrain.parallel.attention import sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from longtrain.parallel.layouts import BlockCyclic, Contiguous, Layout, Zigzag, layout_named, layout_names
from longtrain.parallel.linear_attention import sequence_parallel_linear_attention
from longtrain.parallel.mesh import build_mesh
from longtrain.parallel.shard import Segment, SequenceShard

__all__ = [
    "BlockCyclic",
    "Contiguous",
    "Layout",
    "Segment",
    "SequenceShard",
    "Zigzag",
    "build_mesh",
    "count_messages",
    "layout_named",
    "layout_names",
    "sequence_parallel_attention",
    "sequence_parallel_linear_attention",
]
