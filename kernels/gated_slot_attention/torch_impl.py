"""The scores of tokens and slots, by chunks: linear attention read out on the side that decays.

With S = A^T [M, K], the transposed keys of the slots, and the letters of linear attention's `decays.py`,

    S_t = diag(exp(g_t)) S_{t-1} + slot_t k_t^T                  scores_t = scale * S_t q_t                  [M]

    scores_i = scale * (exp(prefix_i) (S_m q_i) + sum_{j <= i} (q_i . k_j) exp(between_ij) slot_j)

So S is the state of a linear attention with keys `slot` and values `k`, and the scores are what that one's backward
pass calls the gradient of its queries, for output gradients q: see `passes.py`, which gets the rest from it.
"""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.linear_attention.chunking import Tile
from longtrain.kernels.linear_attention.decays import Halvings, lower, upper
from longtrain.kernels.linear_attention.tiles import Inputs, TileWork
from longtrain.kernels.linear_attention.torch_impl import (
    AHEAD,
    LinearAttentionBackward,
    LinearAttentionForward,
    carry_forward,
)
from longtrain.kernels.linear_attention.within_chunk import dot, mix, product

__all__ = ["LinearAttentionBackward", "LinearAttentionForward", "SlotScores"]


class SlotScores:
    """The pass that gives the scores; segments and stages as of `LinearAttentionForward`.

    q, k [B, T, H, K], slot, log_decay [B, T, H, M], in any dtypes. States are [B, N, H, M, K]. An object finishes once.
    """

    def __init__(
        self, q: Tensor, k: Tensor, slot: Tensor, log_decay: Tensor, offsets: np.ndarray, *, scale: float
    ) -> None:
        self._given = slot, slot, k, log_decay, offsets
        self._inputs = Inputs(*self._given, scale=scale, dout=q)
        self._kept: dict[int, tuple[TileWork, Tensor]] = {}

    def summaries(self) -> tuple[Tensor, Tensor]:
        """log_transition [B, N, H, M] and state [B, N, H, M, K]: S_out = exp(log_transition)[..., None] S_in + it."""
        return LinearAttentionForward(*self._given, scale=1.0).summaries()

    def local(self) -> None:
        """Compute what needs no initial state: the scores from within the chunks of the first tiles."""
        for index, tile in enumerate(self._inputs.chunking.tiles[:AHEAD]):
            work, _ = self._kept[index] = self._within(tile)
            work.forget_inputs()

    def finish(self, initial_state: Tensor | None, *, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """The scores [B, T, H, M], in the state dtype, and the states after each segment, or None."""
        inputs = self._inputs
        scores = inputs.k.new_empty(inputs.k.shape, dtype=inputs.dtype)
        entering = inputs.by_segment(initial_state)
        leaving = None
        if return_state:
            leaving = inputs.zero_states() if entering is None else entering.clone()
        carried = None
        for index, tile in enumerate(inputs.chunking.tiles):
            work, found = self._kept.pop(index, None) or self._within(tile)
            work.overwrite = True
            states = work.added_states
            carry_forward(work, states, carried=carried, entering=entering, leaving=leaving)
            carried = states[-1]
            through = product(work.dout, states[:-1].transpose(2, 3))
            assert work.decay.factors.from_start is not None, "only None where there is no decay"
            tile.store(found.addcmul_(through, work.decay.factors.from_start).mul_(inputs.scale), scores)
        return scores, None if leaving is None else inputs.by_row(leaving)

    def _within(self, tile: Tile) -> tuple[TileWork, Tensor]:
        """A tile, and its scores from within chunks, [m, H, C, M], without the scale."""
        work = TileWork(self._inputs, tile)
        return work, _within_chunks(work.dout, work.v, work.k, work.decay.halvings)


def softmax_backward(dweights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the scores, in float32 or, where weights is, in float64."""
    shares = weights * dweights
    return shares.sub_(weights * shares.sum(-1, keepdim=True))


def _within_chunks(q: Tensor, k: Tensor, slot: Tensor, halvings: Halvings) -> Tensor:
    """sum_{j <= i} (q_i . k_j) exp(between_ij) slot_j [m, H, C, M], by halves of chunks as in `Halvings`."""
    found = (q * k).sum(-1, keepdim=True) * slot
    for half, rise, fall in halvings.levels:
        pairs = dot(upper(q, half), lower(k, half))
        upper(found, half).addcmul_(mix(pairs, lower(slot, half) * fall), rise)
    return found


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What this path turns its inputs into: float64 if one of them is, otherwise float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
