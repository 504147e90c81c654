"""How the softmax attention kernels are compiled, and where a vendor's kernel runs instead.

The tables go by architecture, head width and dtype, and by what else a kernel holds in registers (running results, a
softcap's derivative); nothing depends on a length or on documents, so nothing is tuned or compiled in the middle of
training. A block is BLOCK_M queries by BLOCK_N keys; the width is the larger of K and V, up to 64, 128 or 256.

Set by the compiler's account (no spills, shared memory, wgmma where there is one); docs/benchmarks tells what was
measured on which card. Float32 runs IEEE products, which NVIDIA's cards do outside their tensor cores: small blocks.
"""

import torch

from longtrain.kernels import launching
from longtrain.kernels.launching import Config

KERNELS = ("prepare", "forward", "dq", "dkdv")
WIDTHS = (64, 128, 256)

# (BLOCK_M, BLOCK_N, EDGE, warps, stages) by kernel, architecture and width, for bfloat16 and float16. EDGE: the size of
# blocks on the edge of what is visible, of keys (forward, dq) or queries (dkdv).
#
# A warp group's product has 64 rows, and Triton gives each group rows of its own in a product that feeds another one:
# with 8 warps the rows (queries of forward and dq, keys of dkdv) have to be 128, or both groups compute the same.
#
# dkdv, width 128, 64 queries x 128 keys on sm_90. Registers of a thread, of 255: dk and dv 128, p and dp 32 each, p or
# dt as an operand 16, exponent or delta 16. Shared memory: k and v 64 KiB, two stages of q and dout 64 KiB, of 227.
# Arithmetic: 4 * 64 * 128 * 128 = 4.2 M multiply-adds, 2048 cycles of a processor's tensor cores (989 TFLOP/s, 132
# processors, 1.83 GHz), for 32 KiB of q and dout: 256 FLOP a byte, or 16 bytes a cycle, where the L2 cache is said to
# give about 23 (5.5 TB/s). From shared memory s^T = k q^T takes in as many bytes as there is time for at 64 queries,
# at 32 a half too many. So it is bound by arithmetic; with 32 queries x 64 keys, as it was, both warp groups computed
# all of s and dp, and read twice the bytes for the same work. An expectation: not measured here.
#
# dkdv, width 256: dk and dv of 64 keys, the least that a warp group's product takes, leave too few registers, and so
# does a launch for each of both (tried on sm_90: 64 keys spill 408 B; apart, 128 keys, dk 288 and dv 16, the uniform
# registers being full of operands' addresses). So these blocks are smaller, and their products those of sm_80.
_HALVES = {
    "forward": {
        "sm_80": {64: (128, 128, 64, 8, 3), 128: (128, 64, 32, 8, 3), 256: (64, 32, 16, 8, 1)},
        "sm_90": {64: (128, 128, 64, 8, 3), 128: (128, 128, 64, 8, 2), 256: (128, 64, 16, 8, 2)},
        "sm_100": {64: (128, 128, 64, 8, 3), 128: (128, 64, 32, 8, 2), 256: (128, 32, 32, 8, 2)},
        "gfx942": {64: (128, 64, 32, 4, 2), 128: (128, 64, 32, 8, 2), 256: (64, 32, 32, 4, 2)},
    },
    "dq": {
        "sm_80": {64: (128, 64, 32, 8, 2), 128: (128, 32, 16, 8, 2), 256: (32, 16, 16, 8, 1)},
        "sm_90": {64: (128, 128, 64, 8, 2), 128: (128, 64, 32, 8, 2), 256: (64, 64, 16, 8, 2)},
        "sm_100": {64: (128, 64, 32, 8, 2), 128: (128, 64, 32, 8, 2), 256: (64, 32, 32, 8, 2)},
        "gfx942": {64: (128, 64, 32, 8, 2), 128: (64, 64, 32, 4, 2), 256: (64, 16, 16, 8, 1)},
    },
    "dkdv": {
        "sm_80": {64: (32, 64, 16, 4, 1), 128: (32, 64, 32, 8, 1), 256: (16, 32, 16, 8, 1)},
        "sm_90": {64: (64, 128, 32, 8, 2), 128: (64, 128, 32, 8, 2), 256: (32, 32, 16, 8, 1)},
        "sm_100": {64: (64, 128, 16, 8, 2), 128: (64, 128, 32, 8, 2), 256: (32, 32, 16, 8, 1)},
        "gfx942": {64: (64, 64, 32, 4, 2), 128: (32, 64, 16, 4, 2), 256: (16, 32, 16, 4, 1)},
    },
}
# Where results are merged into running ones, which takes registers at the end: what differs.
_ACCUMULATING = {
    ("forward", "sm_80", 64): (128, 64, 32, 8, 3),
    ("forward", "sm_80", 128): (64, 32, 32, 4, 2),
    ("dq", "sm_80", 128): (64, 64, 32, 8, 1),
    ("forward", "sm_90", 256): (64, 16, 16, 8, 1),
    ("forward", "sm_100", 256): (64, 64, 32, 8, 2),
}
# With a softcap, whose derivative takes registers: what differs, accumulating or not.
_SOFTCAP = {
    ("dkdv", "sm_90", 128): (32, 128, 32, 8, 2),
}
_FLOAT32 = {
    "forward": {64: (64, 32, 32, 8, 1), 128: (32, 32, 32, 8, 1), 256: (16, 16, 16, 4, 1)},
    "dq": {64: (64, 32, 32, 8, 1), 128: (16, 16, 16, 4, 1), 256: (16, 16, 16, 8, 1)},
    "dkdv": {64: (32, 32, 16, 4, 1), 128: (32, 32, 32, 8, 1), 256: (16, 16, 16, 4, 1)},
}

_OTHER_FLOAT32 = {("dkdv", "gfx942", 128): (32, 32, 16, 4, 1), ("dq", "gfx942", 256): (16, 16, 16, 4, 1)}

# Where full blocks are loaded by the tensor memory accelerator: forward at width 128 on sm_90 takes 222 registers, not
# 251. Triton's own attention example and FlashAttention-3 load so; of FlexAttention's forward 41 instead of 50 ms were
# reported on an H100 (pytorch #151923). Not measured here.
_DESCRIPTORS = ("sm_90", "sm_100")

# Whose kernel is expected to be faster on plainly full and plainly causal calls; elsewhere ours runs.
_VENDOR = {"sm_80": "flash", "sm_90": "cudnn", "sm_100": "cudnn"}
_WIDEST_VENDOR = {"flash": 256, "cudnn": 128}


def config(
    kernel: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    accumulate: bool = False,
    softcap: bool = False,
) -> Config:
    """The configuration of one of KERNELS; width: max(K, V). accumulate: into running results."""
    if kernel == "prepare":
        return Config({"BLOCK_M": 64 if width <= 128 else 32}, num_warps=4, num_stages=1)
    bucket, architecture = _bucket(width), launching.architecture(device)
    half = dtype != torch.float32
    place = kernel, architecture, bucket
    if half:
        sizes = _HALVES[kernel][architecture][bucket]
        sizes = _ACCUMULATING.get(place, sizes) if accumulate else sizes
        sizes = _SOFTCAP.get(place, sizes) if softcap else sizes
    else:
        sizes = _OTHER_FLOAT32.get(place, _FLOAT32[kernel][bucket])
    rows, keys, edge, warps, stages = sizes
    described = half and architecture in _DESCRIPTORS
    constants = {"BLOCK_M": rows, "BLOCK_N": keys, "EDGE": edge, "DESCRIPTORS": described}
    return Config(constants, num_warps=warps, num_stages=stages)


def _bucket(width: int) -> int:
    return next(bucket for bucket in WIDTHS if width <= bucket)


def vendor(*, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Whose kernel "auto" takes for a plainly full or causal call with K = V = `width`: "flash", "cudnn" or None.

    Widths that are no multiple of 8 and dtypes other than halves are not for them; nor are they where results must be
    the same in every run (``torch.use_deterministic_algorithms``), since they add dq atomically.
    """
    if device.type != "cuda" or torch.version.hip or torch.are_deterministic_algorithms_enabled():
        return None
    name = _VENDOR.get(launching.architecture(device))
    if name is None or dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > _WIDEST_VENDOR[name]:
        return None
    return name
