"""PyTorch's own attention kernels on NVIDIA cards, flash and cuDNN, for plainly full and plainly causal calls.

They mask by a weight of 0, so a NaN or inf in a key's v reaches queries of the same block that do not see it. After a
causal call the Triton kernels therefore look at what was written and compute again each block of it that holds a NaN or
inf, with these contained. Where there is none, that reads the result once.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.softmax_attention import triton_impl

_aten: Any = torch.ops.aten


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, intervals: KeyIntervals, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, V] and lse [B, T, H] of name "flash" or "cudnn"; q, k, v in one half dtype, K = V."""
    out, lse = _forward(name, *(x.transpose(1, 2) for x in (q, k, v)), causal=causal, scale=scale)
    out, lse = out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3]).transpose(1, 2).contiguous()
    if causal:
        options = {"scale": scale, "softcap": None, "accumulate": False, "repair": True}
        triton_impl.forward(q, k, v, intervals, out=out, lse=lse, **options)
    return out, lse


def backward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out, lse))
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in _backward(name, *tensors, causal=causal, scale=scale))
    if causal:
        given = {"out": out, "lse": lse, "dout": dout, "dlse": None, "dq": dq, "dk": dk, "dv": dv}
        options = {"scale": scale, "softcap": None, "accumulate": False, "repair": True}
        triton_impl.backward(q, k, v, intervals, **given, **options)
    return dq, dk, dv


def _forward(name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """By heads: q [B, H, T, K], k and v [B, G, S, K] -> out [B, H, T, K], lse [B, H, T] or [B, H, T, 1]."""
    if name == "flash":
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse


def _backward(
    name: str,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = q.shape[2], k.shape[2]
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a random generator: nothing is dropped
    if name == "flash":
        return _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, *lengths, 0.0, causal, unused, unused, scale=scale
        )
    return _aten._scaled_dot_product_cudnn_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous()[..., None],
        unused,
        unused,
        None,
        None,
        None,
        *lengths,
        0.0,
        causal,
        scale=scale,
    )
