"""Configurations of the gated delta rule's Triton kernels: one small table by architecture, head width and dtype.

The tokens of a chunk, C, are the same in all kernels of a call. BK and BV are the most columns of keys and of values
that a kernel takes at once; the kernels that carry states from chunk to chunk take all keys, and fewer values for it.
"""

import torch

from longtrain.kernels import launching
from longtrain.kernels.launching import Config

# kernel -> (BK, BV, warps, stages) for heads up to 64, 128 and 256 wide. bfloat16 and float16, sm_80 and above.
_HALF = {
    "pairs": ((64, 0, 4, 2), (64, 0, 4, 2), (64, 0, 4, 2)),
    "pairs_channel": ((32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "invert": ((0, 0, 4, 1), (0, 0, 4, 1), (0, 0, 4, 1)),
    "apply": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    "states": ((64, 32, 4, 3), (128, 32, 4, 3), (256, 16, 4, 2)),
    "outputs": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    "dvalues": ((0, 64, 4, 1), (0, 64, 4, 1), (0, 64, 4, 1)),
    "dstates": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 4, 2)),
    "pair_gradients": ((0, 64, 4, 2), (0, 64, 4, 2), (0, 64, 4, 2)),
    "input_gradients": ((64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2)),
    "channel_gradients": ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# On A100, where it differs.
_A100 = {
    "states": ((64, 32, 8, 3), (128, 32, 4, 3), (256, 16, 8, 2)),
    "dstates": ((64, 32, 4, 2), (128, 32, 8, 2), (256, 16, 8, 2)),
    "pair_gradients": ((0, 32, 4, 2), (0, 32, 4, 2), (0, 32, 4, 2)),
    "input_gradients": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    "channel_gradients": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
# The same with little shared memory, and for float32, whose products have no matrix units on NVIDIA's cards.
_SMALL = {
    "pairs": ((32, 0, 4, 1), (32, 0, 4, 1), (32, 0, 4, 1)),
    "pairs_channel": ((32, 0, 8, 1), (32, 0, 8, 1), (32, 0, 8, 1)),
    "invert": ((0, 0, 4, 1), (0, 0, 4, 1), (0, 0, 4, 1)),
    "apply": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "states": ((64, 32, 4, 1), (128, 16, 4, 1), (256, 16, 4, 1)),
    "outputs": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "dvalues": ((0, 32, 4, 1), (0, 32, 4, 1), (0, 32, 4, 1)),
    "dstates": ((64, 32, 4, 1), (128, 16, 4, 1), (256, 16, 4, 1)),
    "pair_gradients": ((0, 32, 4, 1), (0, 32, 4, 1), (0, 32, 4, 1)),
    "input_gradients": ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    "channel_gradients": ((16, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
}
# On B200, where it differs.
_B200 = {"input_gradients": ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2))}
_WIDTHS = (64, 128, 256)
# C for heads of these widths: by (whether the dtype is float32, whether shared memory is small)
_CHUNKS = {
    (False, False): (64, 64, 64),
    (False, True): (64, 64, 32),
    (True, False): (16, 16, 16),
    (True, True): (16, 16, 16),
}


def _bucket(width: int) -> int:
    return next(index for index, widest in enumerate(_WIDTHS) if width <= widest)


def by_rows(dtype: torch.dtype) -> bool:
    """Whether products with whole states go by rows: in float32 they have no room for their operands otherwise."""
    return dtype == torch.float32


def chunk_size(device: torch.device, dtype: torch.dtype, *, key_width: int, value_width: int) -> int:
    """C: 64, 32 or 16 tokens."""
    small = launching.architecture(device) == "gfx942"
    return _CHUNKS[dtype == torch.float32, small][_bucket(max(key_width, value_width))]


def config(kernel: str, device: torch.device, dtype: torch.dtype, *, key_width: int, value_width: int) -> Config:
    """The configuration of one kernel, with the blocks it takes among BK and BV. Blocks are no wider than the heads."""
    architecture = launching.architecture(device)
    table = _SMALL if dtype == torch.float32 or architecture == "gfx942" else _HALF
    if table is _HALF:
        table = _HALF | {"sm_80": _A100, "sm_100": _B200}.get(architecture, {})
    bk, bv, warps, stages = table[kernel][_bucket(max(key_width, value_width))]
    constants = {}
    if bk:
        padded = _padded(key_width)
        constants["BK"] = padded if kernel in ("states", "dstates") else min(bk, padded)
    if bv:
        constants["BV"] = min(bv, _padded(value_width))
    return Config(constants, num_warps=warps, num_stages=stages)


def _padded(width: int) -> int:
    """The next power of two that a matrix unit takes."""
    return max(16, 1 << (width - 1).bit_length())
