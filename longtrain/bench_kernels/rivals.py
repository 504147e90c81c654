"""Operators of others, for tokens [B, T, H, K] as longtrain takes them: PyTorch's attention, flash-linear-attention."""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Operator = Callable[..., Tensor]
SDPA = {"torch flash": "FLASH_ATTENTION", "torch cuDNN": "CUDNN_ATTENTION"}


def sdpa(backend: str) -> Operator:
    """Causal `scaled_dot_product_attention` by one of its kernels; for heads second, [B, H, T, K]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])

    return attend


class Flex:
    """FlexAttention, compiled; for heads second. Its mask is made in every call where `masks_each_time`.

    documents: int [T], the document of each token; window: keys to the left of each query.
    """

    def __init__(
        self,
        tokens: int,
        device: torch.device,
        *,
        documents: Tensor | None = None,
        window: int | None = None,
        masks_each_time: bool = False,
    ) -> None:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = query >= key
            if window is not None:
                seen = seen & (query - key <= window)
            if documents is not None:
                seen = seen & (documents[query] == documents[key])
            return seen

        def mask() -> Any:
            return create_block_mask(visible, None, None, tokens, tokens, device=device, _compile=True)

        self._attend: Any = torch.compile(flex_attention, dynamic=False)
        self._mask = mask
        self._kept = None if masks_each_time else mask()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = self._mask() if self._kept is None else self._kept
        return self._attend(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def fla_name() -> str:
    """flash-linear-attention with its version, where it is installed."""
    try:
        return f"fla {importlib.metadata.version('flash-linear-attention')}"
    except importlib.metadata.PackageNotFoundError:
        return "flash-linear-attention"


def fla_head(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """A fixed decay for each head."""
    return importlib.import_module("fla.ops.simple_gla").chunk_simple_gla(q, k, v, g_gamma=decay)[0]


def fla_channel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """Decays per channel."""
    return importlib.import_module("fla.ops.gla").chunk_gla(q, k, v, g=decay)[0]


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """The gated delta rule."""
    return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)[0]
