"""One device's arithmetic: the operators that longtrain's layers and rings are made of.

Each operator is a folder with a plain definition (`reference.py`) and faster implementations of it; `explain` tells
which one a call runs. Nothing here knows of process groups, modules or environment variables.
"""

from longtrain.kernels.causal_conv1d import causal_conv1d
from longtrain.kernels.dispatch import explain
from longtrain.kernels.gated_delta_rule import gated_delta_rule
from longtrain.kernels.gated_slot_attention import gated_slot_attention
from longtrain.kernels.linear_attention import linear_attention
from longtrain.kernels.linear_cross_entropy import linear_cross_entropy
from longtrain.kernels.rms_norm import rms_norm
from longtrain.kernels.rotary import rotary
from longtrain.kernels.softmax_attention import softmax_attention
from longtrain.kernels.swiglu import swiglu
from longtrain.kernels.tiled_mlp import tiled_mlp

__all__ = [
    "causal_conv1d",
    "explain",
    "gated_slot_attention",
    "gated_delta_rule",
    "linear_attention",
    "linear_cross_entropy",
    "rms_norm",
    "rotary",
    "softmax_attention",
    "swiglu",
    "tiled_mlp",
]
