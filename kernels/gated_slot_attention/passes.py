"""Gated slot attention as two linear passes over segments, joined by a softmax over the slots; for ranks, in stages.

    S_t = A_t^T = diag(exp(g_t)) S_{t-1} + slot_t k_t^T     scores_t = scale * S_t q_t      w_t = softmax(scores_t)
    C_t         = diag(exp(g_t)) C_{t-1} + slot_t v_t^T     o_t = w_t C_t

The second is linear attention, with queries w and keys `slot`. The first is its mirror image. With ds_t the gradient of
scores_t, everything about it follows from one sum that is linear in ds, slot, k and q alike,

    L = scale * sum_t ds_t . S_t q_t = scale * sum_{s <= t} (ds_t exp(g_{s+1} + ... + g_t) . slot_s) (k_s . q_t)

which is the sum of outputs times output gradients of a linear attention with queries ds, keys `slot`, values k and
output gradients q. So that one's outputs are dq, its gradients of keys, values, decays and state are dslot, dk, dg and
dA^T, and its gradient of queries would be the scores. Backward needs the inputs and w.

Neither pass's sums over a segment need the other's: in forward both states travel in one message. In backward A's
gradient needs ds, and so C's scan comes first.
"""

from types import ModuleType
from typing import overload

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_slot_attention import torch_impl

States = tuple[Tensor, Tensor]


class SlotAttentionForward:
    """The forward pass over segments: runs of consecutive tokens, each with states of its own.

    q, k [B, T, G, K], v [B, T, H, V], slot, log_decay [B, T, H, M], in any dtypes, log_decay <= 0; offsets: int64 numpy
    [N+1], boundaries of the N segments, from 0 to T, the same for every row; scale: multiplies q; backend: "torch" or
    "triton". States are A [B, N, H, K, M] and C [B, N, H, M, V], float64 where q, k, v or slot is, otherwise float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot: Tensor,
        log_decay: Tensor,
        offsets: np.ndarray,
        *,
        scale: float,
        backend: str = "torch",
    ) -> None:
        self._stages, self._out_dtype = _stages(backend), q.dtype
        q, k, self._v, self._slot, self._log_decay = _prepared(q, k, v, slot, log_decay, backend)
        self._offsets = offsets
        self._scores = self._stages.SlotScores(q, k, self._slot, self._log_decay, offsets, scale=scale)

    def summaries(self) -> tuple[Tensor, Tensor, Tensor]:
        """What takes both states through a segment: log_transition [B, N, H, M], the sum of its log-decays, A and C.

        A_out = A_in * exp(log_transition)[..., None, :] + A and C_out = exp(log_transition)[..., None] * C_in + C.
        """
        log_transition, keys = self._scores.summaries()
        given = self._slot, self._slot, self._v, self._log_decay, self._offsets
        _, values = self._stages.LinearAttentionForward(*given, scale=1.0).summaries()
        return log_transition, keys.transpose(3, 4).contiguous(), values

    def local(self) -> None:
        """Compute what needs no initial state, of the scores: the second pass begins when they are known."""
        self._scores.local()

    def finish(
        self, initial_state: States | None, *, return_state: bool = True
    ) -> tuple[Tensor, Tensor, States | None]:
        """The outputs [B, T, H, V] in q's dtype, the weights w [B, T, H, M] (state dtype), the states after segments.

        initial_state: the states before each segment, or None for zeros. return_state: False spares those after.
        """
        before = (None, None) if initial_state is None else (_turned(initial_state[0]), initial_state[1])
        scores, keys = self._scores.finish(before[0], return_state=return_state)
        weights = torch.softmax(scores, -1)
        del scores
        given = _operand(weights, self._slot), self._slot, self._v, self._log_decay, self._offsets
        values = self._stages.LinearAttentionForward(*given, scale=1.0)
        out, after = values.finish(before[1], return_state=return_state)
        states = None if keys is None or after is None else (_turned(keys), after)
        return out.to(self._out_dtype), weights, states


class SlotAttentionBackward:
    """The backward pass. Arguments as of `SlotAttentionForward`; weights: forward's; dout [B, T, H, V].

    In order: `value_summaries`, `local_values`, `finish_values`, `key_summaries`, `local_keys`, `finish`. Only the two
    that finish are needed: summaries are for other ranks, and what is local for the time until they have answered.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slot: Tensor,
        log_decay: Tensor,
        weights: Tensor,
        offsets: np.ndarray,
        dout: Tensor,
        *,
        scale: float,
        backend: str = "torch",
    ) -> None:
        self._stages, self._scale, self._offsets = _stages(backend), scale, offsets
        self._like = q, k, v, slot, log_decay
        self._q, self._k, v, self._slot, self._log_decay = _prepared(q, k, v, slot, log_decay, backend)
        self._weights = weights
        given = _operand(weights, self._slot), self._slot, v, self._log_decay, offsets, dout.to(v.dtype)
        self._values = self._stages.LinearAttentionBackward(*given, scale=1.0)
        self._dq: Tensor | None = None

    def log_transition(self) -> Tensor:
        """As the forward pass's, [B, N, H, M]."""
        return self._values.log_transition()

    def value_summaries(self) -> Tensor:
        """The gradient of each segment's initial C from its own outputs, [B, N, H, M, V]."""
        return self._values.summaries()

    def local_values(self, initial_values: Tensor | None) -> None:
        """Compute what needs no gradient of C; from C before each segment, as in the `finish_values` that follows."""
        self._values.local(initial_values, need_decay_gradient=True)

    def finish_values(self, initial_values: Tensor | None, dfinal_values: Tensor | None) -> Tensor:
        """The gradient of C before each segment; from C before each and the gradient of C after each (None: zeros)."""
        dweights, self._dslot, self._dv, self._dlog, dinitial = self._values.finish(
            initial_values, dfinal_values, need_decay_gradient=True
        )
        del self._values
        dscores = torch_impl.softmax_backward(dweights.to(self._weights.dtype), self._weights)
        given = _operand(dscores, self._slot), self._slot, self._k, self._log_decay, self._offsets
        self._outputs = self._stages.LinearAttentionForward(*given, scale=self._scale)
        self._keys = self._stages.LinearAttentionBackward(*given, self._q, scale=self._scale)
        return dinitial

    def key_summaries(self) -> Tensor:
        """The gradient of each segment's initial A from its own outputs, [B, N, H, K, M]."""
        return _turned(self._keys.summaries())

    def local_keys(self, initial_keys: Tensor | None) -> None:
        """Compute what needs no gradient of A, all of dq for one; from A before each segment, as in `finish`."""
        initial = _turned(initial_keys)
        self._dq, _ = self._outputs.finish(initial, return_state=False)
        self._keys.local(initial, need_decay_gradient=True)

    def finish(
        self, initial_keys: Tensor | None, dfinal_keys: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The gradients of q, k, v, slot, log_decay, each like its tensor, and of A before each segment."""
        initial = _turned(initial_keys)
        dq = self._outputs.finish(initial, return_state=False)[0] if self._dq is None else self._dq
        del self._outputs, self._dq
        _, dslot, dk, dlog, dinitial = self._keys.finish(initial, _turned(dfinal_keys), need_decay_gradient=True)
        q, k, v, slot, log_decay = self._like
        return (
            _shared(dq, q),
            _shared(dk, k),
            self._dv.to(v.dtype),
            (_wide(dslot) + self._dslot).to(slot.dtype),
            (dlog + self._dlog).to(log_decay.dtype),
            _turned(dinitial),
        )


def _stages(backend: str) -> ModuleType:
    """The module with SlotScores, LinearAttentionForward and LinearAttentionBackward."""
    if backend != "triton":
        return torch_impl
    from longtrain.kernels.gated_slot_attention import triton_impl

    return triton_impl


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, slot: Tensor, log_decay: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs as the passes take them: q and k per head; the log-decays wide, since two gradients of them are added.

    In PyTorch all is made wide, so that nothing is rounded between the passes; the kernels take one dtype for all.
    """
    dtype = torch_impl.compute_dtype(q, k, v, slot)
    tensors = (q, k, v, slot)
    if backend != "triton":
        q, k, v, slot = (x.to(dtype) for x in tensors)
    elif len({x.dtype for x in tensors}) > 1:
        q, k, v, slot = (x.to(torch.float32) for x in tensors)
    heads = v.shape[2]
    return _per_head(q, heads), _per_head(k, heads), v, slot, log_decay.to(dtype)


def _operand(x: Tensor, slot: Tensor) -> Tensor:
    """Weights or their gradients as the second pass takes them: in bfloat16 beside such; float16 they may outgrow."""
    return x.to(torch.bfloat16) if slot.dtype == torch.bfloat16 else x


def _per_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, G, K] as [B, T, H, K]: a view where one head serves all, otherwise a copy."""
    if x.shape[2] == heads:
        return x
    return x.expand(-1, -1, heads, -1) if x.shape[2] == 1 else x.repeat_interleave(heads // x.shape[2], dim=2)


def _shared(gradient: Tensor, x: Tensor) -> Tensor:
    """A gradient [B, T, H, K], summed over the heads that share one of x's, in x's dtype."""
    if gradient.shape[2] != x.shape[2]:
        gradient = _wide(gradient).unflatten(2, (x.shape[2], -1)).sum(3)
    return gradient.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@overload
def _turned(states: Tensor) -> Tensor: ...
@overload
def _turned(states: None) -> None: ...
def _turned(states: Tensor | None) -> Tensor | None:
    """A [B, N, H, K, M] as S [B, N, H, M, K] and back; None for None."""
    return None if states is None else states.transpose(3, 4).contiguous()
