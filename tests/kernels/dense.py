"""Masks pair by pair and dense softmax attention, written apart from the library to check it."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

Window = tuple[int | None, int | None] | None


def offsets(documents: list[int]) -> np.ndarray:
    """Lengths of documents -> their boundaries, int64 [N+1]."""
    return np.cumsum([0, *documents]).astype(np.int64)


def sees(
    query: int, key: int, *, causal: bool, window: Window, query_offsets: np.ndarray, key_offsets: np.ndarray
) -> bool:
    """Whether one query sees one key, said as plainly as the contract says it."""
    for q_start, q_stop, k_start, k_stop in zip(
        query_offsets[:-1], query_offsets[1:], key_offsets[:-1], key_offsets[1:], strict=True
    ):
        if q_start <= query < q_stop:
            # Counted from the documents' ends: the last query and the last key stand at 0.
            ahead = (key - k_stop) - (query - q_stop)
            left, right = window or (None, None)
            return bool(
                k_start <= key < k_stop
                and (not causal or ahead <= 0)
                and (left is None or ahead >= -left)
                and (right is None or ahead <= right)
            )
    raise AssertionError("every query lies in a document")


def dense_mask(
    *, causal: bool, window: Window = None, query_offsets: np.ndarray, key_offsets: np.ndarray
) -> np.ndarray:
    """Who sees whom: bool [T, S]."""
    see = partial(sees, causal=causal, window=window, query_offsets=query_offsets, key_offsets=key_offsets)
    shape = int(query_offsets[-1]), int(key_offsets[-1])
    return np.array([[see(i, j) for j in range(shape[1])] for i in range(shape[0])], bool).reshape(shape)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: np.ndarray, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The whole T x S softmax in float64, differentiable; finite inputs only."""
    visible = torch.from_numpy(mask)[:, None, :]  # [T, 1, S]
    share = q.shape[2] // k.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(share, 2), v.double().repeat_interleave(share, 2)
    scores = torch.einsum("bthk,bshk->bths", q, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seeing = visible.any(-1)  # [T, 1]
    lse = torch.where(visible | ~seeing[..., None], scores, -torch.inf).logsumexp(-1) if k.shape[1] else scores.sum(-1)
    denominators = lse if sinks is None else torch.log(lse.exp() + sinks.double().exp())
    weights = torch.where(visible, (scores - denominators[..., None]).exp(), 0)
    return torch.einsum("bths,bshv->bthv", weights, v), torch.where(seeing, lse, -torch.inf)
