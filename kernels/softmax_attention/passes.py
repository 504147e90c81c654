"""The two passes of softmax attention on key intervals, for one set of keys: what rings call, whatever computes it."""

from typing import Any

import torch
from torch import Tensor

from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.softmax_attention import chunked, reference, torch_impl


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
    backend: str,
) -> None:
    """Attend to one set of keys and merge the result, in place, into that of the sets before it.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]; `intervals`: for T queries among S keys, the same for every row.
    out [B, T, H, V] and lse [B, T, H]: the running result, float32 (float64 for float64 inputs) whatever q's dtype; at
    the start zeros and -inf. Sets of keys may come in any order; a query that sees none of them is left untouched.
    Not differentiable: `attention_backward` is its gradient.
    """
    with without_autocast(q.device):
        _implementation(q, k, v, backend).forward(q, k, v, intervals, scale=scale, softcap=softcap, out=out, lse=lse)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    softcap: float | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    backend: str,
    frugal: bool = False,
) -> None:
    """Add, in place, the gradients that belong to one set of keys.

    q, k, v, intervals, scale, softcap as in `attention_forward`; out [B, T, H, V] and lse [B, T, H] final, over all
    sets of keys; dout [B, T, H, V] and dlse [B, T, H] (None: zero) their gradients; dq [B, T, H, K], dk [B, S, G, K],
    dv [B, S, G, V] the running gradients. All of these in float32 (float64 for float64 inputs).
    frugal: for a caller that holds other buffers meanwhile, compute in smaller parts, with smaller temporaries.
    """
    implementation = _implementation(q, k, v, backend)
    options = {"scale": scale, "softcap": softcap} | ({"frugal": frugal} if implementation is torch_impl else {})
    given = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
    with without_autocast(q.device):
        implementation.backward(q, k, v, intervals, **given, **options)


def widest_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _implementation(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Any:
    """The module with the backend's `forward` and `backward`."""
    widths = {"K": q.shape[3], "V": v.shape[3]}
    dtype = widest_dtype(q, k, v)
    chosen = choose_backend("softmax_attention", backend, device=q.device, dtype=dtype, widths=widths)
    if chosen == "triton":
        from longtrain.kernels.softmax_attention import triton_impl

        return triton_impl
    return {"reference": reference, "torch": torch_impl, "chunked": chunked}[chosen]
