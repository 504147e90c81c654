"""What ships in Triton: each call launches some of the kernels' variants, on tensors without data."""

from collections.abc import Callable

import torch

from longtrain.kernels.linear_cross_entropy import triton_impl
from longtrain.kernels.linear_cross_entropy.loop import Options


def calls(*, full: bool) -> dict[str, Callable[[], None]]:
    """Calls by name, which under `launching.recording` say which kernels a card would run.

    full: every dtype with and without softcap; otherwise bfloat16, the dtype that is trained in.
    """
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    chosen = [(dtype, cap) for dtype in names for cap in (None, 30.0)] if full else [(torch.bfloat16, None)]
    return {
        names[dtype] + ("" if softcap is None else ", softcap"): lambda dtype=dtype, softcap=softcap: _call(
            dtype, softcap
        )
        for dtype, softcap in chosen
    }


def _call(dtype: torch.dtype, softcap: float | None) -> None:
    hidden = torch.empty(8192, 4096, dtype=dtype, device="meta")
    weight = torch.empty(8192, 4096, dtype=dtype, device="meta")
    targets = torch.empty(8192, dtype=torch.int64, device="meta")
    options = Options(ignore_index=-100, z_loss=1e-4, softcap=softcap)
    losses, lse = triton_impl.forward(hidden, weight, targets, options)
    triton_impl.backward(losses, hidden, weight, targets, lse, options, need_hidden=True, need_weight=True)
