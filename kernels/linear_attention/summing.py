"""What a segment sums up to, and nothing else: one light sweep over its keys and values, for scans over ranks.

    S_ext = sum_t (k_t exp(g_{t+1} + ... + g_n)) v_t^T            forward
    D_ext = sum_t (q_t exp(g_1 + ... + g_t)) do_t^T               backward

by blocks of tokens: a block's own sum is one matrix product per head on the tensors as they lie in memory, and what was
summed up so far decays by the block's total. Sums of log-decays run within a block and are never subtracted, as in
`decays.py`: nothing overflows, log-decays of -inf work, and a NaN reaches only what depends on it.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.kernels.linear_attention.decays import exponentials

_CPU_BLOCK, _DEVICE_BLOCK = 512, 4096  # tokens: on a CPU a block's tensors stay near the processor


def sum_up(
    a: Tensor, b: Tensor, log_decay: Tensor | None, offsets: np.ndarray, *, dtype: torch.dtype, forward: bool
) -> Tensor:
    """The sum of decayed a_t b_t^T over each segment: [B, N, H, K, V] in `dtype`.

    a [B, T, G, K], b [B, T, H, V]; log_decay None, [H], [B, T, H] or [B, T, H, K]; offsets: numpy [N+1], segments.
    forward: decayed up to the segment's end, as keys are; otherwise from its start, as queries are.
    """
    rows, heads = a.shape[0], b.shape[2]
    sums = b.new_zeros((rows, len(offsets) - 1, heads, a.shape[3], b.shape[3]), dtype=dtype)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(rows, a.shape[1], heads)
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    size = _CPU_BLOCK if a.device.type == "cpu" else _DEVICE_BLOCK
    for row in range(rows):
        for segment, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            starts = range(start, stop, size)
            for begin in starts if forward else reversed(starts):
                block = slice(begin, min(begin + size, stop))
                log = None if log_decay is None else log_decay[row, block]
                _add_block(sums[row, segment], a[row, block], b[row, block], log, forward=forward)
    return sums


def _add_block(total: Tensor, a: Tensor, b: Tensor, log: Tensor | None, *, forward: bool) -> None:
    """total [H, K, V] <- exp(the block's log-decays) total + its sum; a [n, G, K], b [n, H, V], log [n, H, 1 or K]."""
    a, b, share = a.to(total.dtype), b.to(total.dtype), b.shape[1] // a.shape[1]
    if log is not None:
        log = log.to(total.dtype)
        if forward:
            from_here = _running_sums(log.flip(0)).flip(0)
            through, decay = from_here[0], F.pad(from_here[1:], (0, 0, 0, 0, 0, 1))
        else:
            decay = _running_sums(log)
            through = decay[-1]
        total.mul_(exponentials(through).unsqueeze(-1))
        a = (a if share == 1 else a.repeat_interleave(share, dim=1)) * exponentials(decay)
        share = 1
    if a.device.type == "cpu":
        for head in range(b.shape[1]):  # matrices with a stride between rows, which need no copy
            total[head].addmm_(a[:, head // share].t(), b[:, head])
    else:
        a = a if share == 1 else a.repeat_interleave(share, dim=1)
        total.baddbmm_(a.permute(1, 2, 0), b.transpose(0, 1))


def _running_sums(x: Tensor) -> Tensor:
    """Along the first dimension; CUDA has no deterministic ones."""
    return x.cumsum(0) if x.device.type == "cpu" else sums_by_doubling(x)


def sums_by_doubling(x: Tensor) -> Tensor:
    """Running sums of x [n, ...] in log2(n) steps; nothing is subtracted: -inf and NaN reach later sums only."""
    shift = 1
    while shift < x.shape[0]:
        x = torch.cat((x[:shift], x[shift:] + x[:-shift]))
        shift *= 2
    return x
