"""How the softmax attention kernels are compiled, and where a vendor's kernel runs instead.

The tables go by architecture, head width and dtype; nothing depends on a length or on documents, so nothing is tuned or
compiled in the middle of training. A block is BLOCK_M queries by BLOCK_N keys; the width is the larger of K and V, up
to 64, 128 or 256.

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
_HALVES = {
    "forward": {
        "sm_80": {64: (128, 128, 64, 8, 3), 128: (128, 64, 32, 8, 3), 256: (64, 32, 16, 8, 1)},
        "sm_90": {64: (128, 128, 64, 8, 3), 128: (128, 128, 64, 8, 2), 256: (128, 64, 32, 8, 2)},
        "sm_100": {64: (128, 128, 64, 8, 3), 128: (128, 64, 32, 8, 2), 256: (128, 32, 32, 8, 2)},
        "gfx942": {64: (128, 64, 32, 4, 2), 128: (128, 64, 32, 8, 2), 256: (64, 32, 32, 4, 2)},
    },
    "dq": {
        "sm_80": {64: (128, 64, 32, 8, 2), 128: (128, 64, 16, 8, 2), 256: (32, 16, 16, 8, 1)},
        "sm_90": {64: (128, 128, 64, 8, 2), 128: (128, 64, 32, 8, 2), 256: (64, 64, 32, 8, 2)},
        "sm_100": {64: (128, 64, 32, 8, 2), 128: (128, 64, 32, 8, 2), 256: (64, 32, 32, 8, 2)},
        "gfx942": {64: (128, 64, 32, 8, 2), 128: (64, 64, 32, 4, 2), 256: (64, 16, 16, 8, 1)},
    },
    "dkdv": {
        "sm_80": {64: (32, 64, 32, 4, 2), 128: (32, 64, 32, 8, 1), 256: (16, 32, 16, 8, 1)},
        "sm_90": {64: (64, 128, 32, 8, 2), 128: (32, 64, 32, 8, 2), 256: (32, 32, 16, 8, 1)},
        "sm_100": {64: (64, 128, 32, 8, 2), 128: (32, 64, 32, 8, 2), 256: (32, 32, 16, 8, 1)},
        "gfx942": {64: (64, 64, 32, 4, 2), 128: (32, 64, 16, 4, 2), 256: (16, 32, 16, 8, 1)},
    },
}
# Where results are merged into running ones, which takes registers at the end: what differs.
_ACCUMULATING = {
    ("forward", "sm_80", 128): (64, 32, 32, 4, 2),
    ("dq", "sm_80", 128): (64, 64, 32, 8, 1),
    ("forward", "sm_90", 128): (128, 64, 64, 8, 3),
    ("forward", "sm_90", 256): (64, 16, 16, 8, 1),
    ("dq", "sm_90", 256): (32, 16, 16, 8, 1),
}
_FLOAT32 = {
    "forward": {64: (64, 32, 32, 8, 1), 128: (32, 32, 32, 8, 1), 256: (16, 16, 16, 4, 1)},
    "dq": {64: (64, 32, 32, 8, 1), 128: (16, 16, 16, 4, 1), 256: (16, 16, 16, 4, 1)},
    "dkdv": {64: (32, 32, 16, 4, 1), 128: (16, 16, 16, 4, 1), 256: (16, 16, 16, 8, 1)},
}

# Whose kernel is expected to be faster on plainly full and plainly causal calls; elsewhere ours runs.
_VENDOR = {"sm_80": "flash", "sm_90": "cudnn", "sm_100": "cudnn"}
_WIDEST_VENDOR = {"flash": 256, "cudnn": 128}


def config(kernel: str, *, device: torch.device, dtype: torch.dtype, width: int, accumulate: bool = False) -> Config:
    """The configuration of one of KERNELS; width: max(K, V). accumulate: into running results."""
    if kernel == "prepare":
        return Config({"BLOCK_M": 64 if width <= 128 else 32}, num_warps=4, num_stages=1)
    bucket, architecture = next(bucket for bucket in WIDTHS if width <= bucket), launching.architecture(device)
    sizes = _FLOAT32[kernel][bucket] if dtype == torch.float32 else _HALVES[kernel][architecture][bucket]
    if accumulate and dtype != torch.float32:
        sizes = _ACCUMULATING.get((kernel, architecture, bucket), sizes)
    rows, keys, edge, warps, stages = sizes
    return Config({"BLOCK_M": rows, "BLOCK_N": keys, "EDGE": edge}, num_warps=warps, num_stages=stages)


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
