"""Recurrences as mixers call them: over ranks in training, from a state on in generation, token by token in steps.

Each takes ``state``: None in training (every document starts from nothing, and nobody wants the state: None comes
back); otherwise the state before the first token, of one document on one device, and the state after the last comes
back. A single token from a state is a few plain PyTorch operations: constant time, differentiable.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.kernels.precision import without_autocast
from longtrain.parallel import (
    SequenceShard,
    sequence_parallel_delta_rule,
    sequence_parallel_linear_attention,
    sequence_parallel_slot_attention,
)


class MemoryState(NamedTuple):
    """The state of a mixer that keeps one matrix per head."""

    memory: Tensor  # [B, H, K, V], float32 (float64 for a float64 model)
    position: int  # tokens so far

    @classmethod
    def empty(cls, shape: tuple[int, int, int, int], device: torch.device | str, dtype: torch.dtype) -> "MemoryState":
        """Zeros of shape (B, H, K, V), for inputs of a dtype."""
        return cls(torch.zeros(shape, device=device, dtype=state_dtype(dtype)), 0)

    def after(self, tokens: int, memory: Tensor | None) -> "MemoryState":
        """What has become of it after further tokens."""
        assert memory is not None  # a scan from a state returns one
        return MemoryState(memory, self.position + tokens)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a recurrence's state for inputs of a dtype: float64 for float64, otherwise float32."""
    return torch.promote_types(dtype, torch.float32)


def positions(shard: SequenceShard, device: torch.device, state: object) -> Tensor:
    """Each token's position in its document, ``[T_w]`` int64; after a state those that follow its ``position``."""
    inside = shard.document_positions_on(device)
    return inside if state is None else inside + state.position  # pyright: ignore[reportAttributeAccessIssue]


def is_step(shard: SequenceShard, state: object) -> bool:
    """Whether a call is a single token from a state on."""
    return state is not None and shard.length == 1 and shard.world == 1


def scan_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    shard: SequenceShard,
    state: Tensor | None,
    *,
    scale: float | None = None,
    strategy: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T``, ``o_t = scale * q_t S_t``.

    q, k ``[B, T_w, G, K]``, v ``[B, T_w, H, V]``, log_decay as in ``sequence_parallel_linear_attention``; state None or
    ``[B, H, K, V]``, float32 (float64 for float64 inputs). Returns o ``[B, T_w, H, V]`` and the state (None for None).
    """
    if state is None:
        return sequence_parallel_linear_attention(q, k, v, log_decay, shard, scale=scale, strategy=strategy)
    if not is_step(shard, state):
        return sequence_parallel_linear_attention(
            q, k, v, log_decay, shard, scale=scale, strategy=strategy, initial_state=state, return_state=True
        )
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        if log_decay is not None:
            decay = log_decay.to(state.dtype).exp()
            decay = decay if log_decay.ndim == 1 else decay[:, 0]  # [H], [B, H] or [B, H, K]
            state = state * (decay[..., None] if log_decay.ndim == 4 else decay[..., None, None])
        state = state + one_token(k, state)[..., None] * one_token(v, state)[..., None, :]
        out = (one_token(q, state) * factor)[..., None, :] @ state
    return out.transpose(1, 2).to(q.dtype), state


def scan_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    shard: SequenceShard,
    state: Tensor | None,
    *,
    scale: float | None = None,
    strategy: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """``S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T``, ``o_t = scale * q_t S_t``.

    q, k ``[B, T_w, G, K]``, v ``[B, T_w, H, V]``, beta ``[B, T_w, H]``, log_decay None, ``[B, T_w, H]`` or ``[B, T_w,
    H, K]``; state None or ``[B, H, K, V]``, float32 (float64 for float64 inputs). Returns o ``[B, T_w, H, V]`` and the
    state (None for None).
    """
    if state is None:
        return sequence_parallel_delta_rule(q, k, v, beta, log_decay, shard, scale=scale, strategy=strategy)
    if not is_step(shard, state):
        return sequence_parallel_delta_rule(
            q, k, v, beta, log_decay, shard, scale=scale, strategy=strategy, initial_state=state, return_state=True
        )
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        if log_decay is not None:
            decay = log_decay[:, 0].to(state.dtype).exp()  # [B, H] or [B, H, K]
            state = state * (decay[..., None] if log_decay.ndim == 4 else decay[..., None, None])
        key = one_token(k, state)
        held = (key[..., None, :] @ state).squeeze(2)  # what the state holds under this key
        change = beta[:, 0, :, None].to(state.dtype) * (one_token(v, state) - held)
        state = state + key[..., None] * change[..., None, :]
        out = (one_token(q, state) * factor)[..., None, :] @ state
    return out.transpose(1, 2).to(q.dtype), state


def scan_slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot: Tensor,
    log_decay: Tensor,
    shard: SequenceShard,
    state: tuple[Tensor, Tensor] | None,
    *,
    scale: float | None = None,
    strategy: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``A_t = A_{t-1} diag(exp(g_t)) + k_t slot_t^T``, ``C_t = diag(exp(g_t)) C_{t-1} + slot_t v_t^T``; softmax of A.

    ``o_t = softmax(scale * q_t A_t) C_t`` with g_t = log_decay. q, k ``[B, T_w, G, K]``, v ``[B, T_w, H, V]``, slot and
    log_decay ``[B, T_w, H, M]``; state None or A ``[B, H, K, M]`` and C ``[B, H, M, V]``, float32 (float64 for float64
    inputs). Returns o ``[B, T_w, H, V]`` and the state (None for None).
    """
    if state is None:
        return sequence_parallel_slot_attention(q, k, v, slot, log_decay, shard, scale=scale, strategy=strategy)
    keys, values = state
    if not is_step(shard, state):
        out, after = sequence_parallel_slot_attention(
            q,
            k,
            v,
            slot,
            log_decay,
            shard,
            scale=scale,
            strategy=strategy,
            initial_state=(keys, values),
            return_state=True,
        )
        assert after is not None
        # They come as parts of one tensor, which steps would read across.
        return out, (after[0].contiguous(), after[1].contiguous())
    factor = q.shape[3] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        decay, write = log_decay[:, 0].to(keys.dtype).exp(), slot[:, 0].to(keys.dtype)  # [B, H, M]
        keys = keys * decay[..., None, :] + one_token(k, keys)[..., None] * write[..., None, :]
        values = values * decay[..., None] + write[..., None] * one_token(v, values)[..., None, :]
        scores = (one_token(q, keys) * factor)[..., None, :] @ keys
        out = torch.softmax(scores, -1) @ values
    return out.transpose(1, 2).to(q.dtype), (keys, values)


def one_token(x: Tensor, state: Tensor) -> Tensor:
    """x ``[B, 1, G, K]`` as ``[B, H, K]`` in the state's dtype, each of G heads once for each head that shares it."""
    return x[:, 0].to(state.dtype).repeat_interleave(state.shape[1] // x.shape[2], dim=1)
