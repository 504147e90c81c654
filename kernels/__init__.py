"""One device's arithmetic: the operators that longtrain's layers and rings are made of.

Each operator is a folder with a plain definition (`reference.py`) and faster implementations of it; `explain` tells
which one a call runs. Nothing here knows of process groups, modules or environment variables.
"""

from longtrain.kernels.dispatch import explain
from longtrain.kernels.linear_attention import linear_attention
from longtrain.kernels.softmax_attention import softmax_attention

__all__ = ["explain", "linear_attention", "softmax_attention"]
