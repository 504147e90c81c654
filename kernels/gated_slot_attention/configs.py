"""Blocks of the kernels of `triton_kernels.py`; chunks are those of linear attention's kernels.

All programs take a chunk and a head: BM slots and BK columns of q and k at a time.
"""

from longtrain.kernels.launching import Config


def write_slots(architecture: str, kind: str, width: str) -> Config:
    """For `write_slots`, which is bound by memory."""
    return Config({"BM": 32}, num_warps=4, num_stages=1)


def add_within(architecture: str, kind: str, width: str) -> Config:
    """For `add_within`, whose levels need many registers."""
    if kind == "wide":
        return Config({"BM": 32, "BK": 32}, num_warps=4, num_stages=1)
    slots = 16 if architecture == "gfx942" else 32
    return Config({"BM": slots, "BK": 64}, num_warps=8, num_stages=1)
