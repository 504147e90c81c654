"""Softmax attention on one device: the public operator, and the two passes on key intervals that rings call too.

reference      the definition, query by query
torch_impl     tiles of PyTorch calls, fast on a CPU; chunked: chunks of queries and keys, in little memory on any
               device; containment: NaN and inf in both
triton_impl    the Triton kernels' host side; triton_forward, triton_backward, triton_common: the kernels; configs:
               how they are compiled; device_intervals: what they are told of a mask; shipped: what tests compile
vendor         flash and cuDNN through PyTorch
passes         one set of keys, forward and backward, by any of them
operators      the registered operator pair
"""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.softmax_attention import operators, reference
from longtrain.kernels.softmax_attention.passes import attention_backward, attention_forward, widest_dtype

__all__ = ["apply_sinks", "attention_backward", "attention_forward", "softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    cu_seqlens: Tensor | np.ndarray | None = None,
    cu_seqlens_k: Tensor | np.ndarray | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over the keys that each query sees (Vaswani et al. 2017, equation 1).

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V] with G a divisor of H -> out [B, T, H, V] in q's dtype, and lse
    [B, T, H], the natural logarithm of the sum of exp(score), in float32 (float64 for float64 inputs). Floating-point
    dtypes may differ; halves are computed in float32. Both results are differentiable. A query that sees no key gets
    out 0, lse -inf and exactly zero gradients.

    causal: a query sees the keys up to its own position; with S != T the last query stands on the last key.
    window: (left, right): the query on key c sees c-left ... c+right; None inside is unlimited; causal makes right 0.
    cu_seqlens: int32 or int64 [N+1], boundaries of N documents packed into the one row, from 0 to T, never decreasing;
        no query sees another document. Best kept on the CPU: elsewhere the host waits to read it.
    cu_seqlens_k: the same for the keys, from 0 to S; None means `cu_seqlens`.
    scale: multiplies q . k; default K ** -0.5. softcap: c turns scores into c * tanh(score / c) (Gemma 2).
    sinks: [H], logits that join each softmax's denominator only; lse does not include them (gpt-oss).
    return_lse: False returns (out, None).
    backend: "auto", "triton", "torch", "chunked" or "reference"; `longtrain.kernels.explain` tells what runs. On
        NVIDIA's cards "auto" leaves plainly full and plainly causal calls in half precision to PyTorch's flash or cuDNN
        kernel.

    A NaN or inf reaches the queries that see it, and the keys that these see, and nothing else: no other document, row
    or head.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, boundaries, windows, backends.
    """
    _check_inputs(q, k, v, sinks)
    chosen = _chosen(backend, str(q.device), widest_dtype(q, k, v), q.shape[3], v.shape[3])
    checks.true_or_false("causal", causal)
    checks.true_or_false("return_lse", return_lse)
    window = checks.attention_window(window)
    scale = checks.number("scale", scale)
    scale = float(q.shape[3] ** -0.5) if scale is None else scale
    softcap = checks.number("softcap", softcap, positive=True)
    compiling = torch.compiler.is_compiling()  # then the operator, when it runs, checks the boundaries
    query_offsets, key_offsets = (None, None) if compiling else operators.documents(q, k, cu_seqlens, cu_seqlens_k)
    if chosen == "reference" and query_offsets is not None and key_offsets is not None:
        seen = [
            reference.seen_by(i, causal=causal, window=window, query_offsets=query_offsets, key_offsets=key_offsets)
            for i in range(q.shape[1])
        ]
        out, lse = reference.attention(q, k, v, seen, scale=scale, softcap=softcap, sinks=sinks)
        return out.to(q.dtype), lse if return_lse else None
    left, right = (None, None) if window is None else window
    out, lse = operators.forward(
        q,
        k,
        v,
        _on_host(cu_seqlens if compiling else query_offsets, cu_seqlens),
        _on_host(cu_seqlens_k if compiling else key_offsets, cu_seqlens_k),
        causal=causal,
        left=left,
        right=right,
        scale=scale,
        softcap=softcap,
        backend="auto" if (backend, chosen) == ("auto", "triton") else chosen,
        wide=sinks is not None,
    )
    out = out if sinks is None else apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse if return_lse else None


def apply_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Let one logit per head join the denominators of finished softmaxes: out * exp(lse) / (exp(lse) + exp(sink)).

    out [B, T, H, V], lse [B, T, H], sinks [H] -> out [B, T, H, V] in out's dtype. Differentiable in all three.
    """
    seeing = lse != -torch.inf  # elsewhere out is 0 already, and a sink of -inf would make NaN
    # Not sigmoid itself: its gradient takes 1 - share, which loses every digit where the sink's part is small.
    share = torch.nn.functional.logsigmoid(torch.where(seeing, lse, 0) - sinks.to(lse.dtype)).exp()
    return out * torch.where(seeing, share, 0)[..., None]


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    checks.floating("q", q, "[B, T, H, K]")
    checks.floating("k", k, "[B, S, G, K]")
    checks.floating("v", v, "[B, S, G, V]")
    batch, _, heads, width = q.shape
    if heads < 1 or width < 1:
        raise ValueError(f"q: got shape {tuple(q.shape)}, expected [B, T, H, K] with H and K at least 1")
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(f"k: got shape {tuple(k.shape)}, expected [B, S, G, K] with q's B = {batch}, K = {width}")
    checks.grouped_heads(heads, k.shape[2], name="k")
    checks.sizes("v", v, (*k.shape[:3], None), "[B, S, G, V]")
    if sinks is not None:
        checks.sizes("sinks", checks.floating("sinks", sinks, "[H]"), (heads,), "[H]")
    checks.same_device(q=q, k=k, v=v, sinks=sinks)


@torch.compiler.assume_constant_result  # it looks at what is installed, which torch.compile cannot trace
def _chosen(backend: str, device: str, dtype: torch.dtype, width: int, value_width: int) -> str:
    widths = {"K": width, "V": value_width}
    return choose_backend("softmax_attention", backend, device=device, dtype=dtype, widths=widths)


def _on_host(offsets: Tensor | np.ndarray | None, given: Tensor | np.ndarray | None) -> Tensor | None:
    """Boundaries as the operator takes them; None where the caller gave none."""
    if given is None or offsets is None:
        return None
    offsets = torch.from_numpy(offsets) if isinstance(offsets, np.ndarray) else offsets
    return offsets.detach().to(device="cpu", dtype=torch.int64)
