"""Linear attention by chunks, as matrix products: constant time per token, memory linear in T.

With the letters of `decays.py`, for chunk m with state S_m before it:

    o_i     = S_m^T (q_i exp(prefix_i)) + sum_{j <= i} (q_i . k_j exp(between_ij)) v_j            (within_chunk.py)
    S_{m+1} = exp(total) S_m + sum_j (k_j exp(suffix_j)) v_j^T

and backward, with D_{m+1} the gradient of S_{m+1}:

    D_m  = exp(total) D_{m+1} + sum_i (q_i exp(prefix_i)) do_i^T
    dq_i = ... + exp(prefix_i) (S_m do_i)       dk_j = ... + exp(suffix_j) (D_{m+1} v_j)
    dv_j = ... + D_{m+1}^T (k_j exp(suffix_j))

"Gated Linear Attention Transformers with Hardware-Efficient Training" (Yang et al. 2024, section 4); "Various Lengths,
Constant Speed" (Qin et al. 2024, equations 9 to 16) for fixed decays. Backward keeps nothing of forward but its inputs.

Each pass is a class with stages, so that a sequence spread over ranks can send what its segments sum up to before the
rest is computed: `summaries()`, a light sweep of its own (`summing.py`), then `local(...)` while messages travel, which
computes in the first tiles what needs no state (and in backward all states, since those that enter are known from
forward), then `finish(...)`, which goes tile by tile and keeps no other tile: tensors of a whole long segment would
cost more than computing them again. An object finishes once.
"""

import numpy as np
from torch import Tensor

from longtrain.kernels.linear_attention.summing import sum_up
from longtrain.kernels.linear_attention.tiles import Inputs, TileWork

AHEAD = 4  # tiles that `local` computes: enough to hide a small message, and little to keep


class LinearAttentionForward:
    """The forward pass over segments: runs of consecutive tokens, each with a state of its own.

    q, k [B, T, G, K], v [B, T, H, V], in any dtypes; log_decay None, [H], [B, T, H] or [B, T, H, K], <= 0; offsets:
    int64 numpy [N+1], boundaries of the N segments, from 0 to T, the same for every row; scale: multiplies q.
    States are [B, N, H, K, V] in the state dtype: float64 if q, k or v is, otherwise float32.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, offsets: np.ndarray, *, scale: float
    ) -> None:
        self._inputs = Inputs(q, k, v, log_decay, offsets, scale=scale)
        self._segments = log_decay, offsets
        self._kept: dict[int, TileWork] = {}

    def summaries(self) -> tuple[Tensor, Tensor]:
        """What takes a state through a segment: S_out = exp(log_transition)[..., None] * S_in + state.

        Returns log_transition [B, N, H, 1 or K], the sum of the segment's log-decays (it may be -inf), and state
        [B, N, H, K, V], what the segment reaches from zeros. Of an empty segment both are 0.
        """
        inputs = self._inputs
        states = sum_up(inputs.k, inputs.v, *self._segments, dtype=inputs.dtype, forward=True)
        return inputs.decay.log_transition(), states

    def local(self) -> None:
        """Compute what needs no initial state: the outputs from within the chunks of the first tiles."""
        for index, tile in enumerate(self._inputs.chunking.tiles[:AHEAD]):
            work = self._kept[index] = TileWork(self._inputs, tile)
            _ = work.local_out
            work.forget_inputs()

    def finish(self, initial_state: Tensor | None, *, return_state: bool = True) -> tuple[Tensor, Tensor | None]:
        """The outputs [B, T, H, V], in q's dtype, and the states after each segment [B, N, H, K, V].

        initial_state: [B, N, H, K, V], the states before each segment, or None for zeros.
        return_state: False spares the states, and returns None for them.
        """
        inputs = self._inputs
        out = inputs.v.new_empty(inputs.v.shape, dtype=inputs.q.dtype)
        entering = inputs.by_segment(initial_state)
        leaving = _like(entering, inputs) if return_state else None
        carried = None
        for index, tile in enumerate(inputs.chunking.tiles):
            work = self._kept.pop(index, None) or TileWork(inputs, tile)
            _ = work.local_out
            work.overwrite = True
            states = work.added_states
            carry_forward(work, states, carried=carried, entering=entering, leaving=leaving)
            carried = states[-1]
            tile.store(work.out(states[:-1]), out)
        return out, None if leaving is None else inputs.by_row(leaving)


class LinearAttentionBackward:
    """The backward pass. Arguments as of `LinearAttentionForward`; dout [B, T, H, V], the gradient of its outputs."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        dout: Tensor,
        *,
        scale: float,
    ) -> None:
        self._inputs = Inputs(q, k, v, log_decay, offsets, scale=scale, dout=dout)
        self._segments, self._dout = (log_decay, offsets), dout
        self._kept: dict[int, TileWork] = {}
        self._states: list[Tensor] | None = None

    def summaries(self) -> Tensor:
        """The gradient of each segment's initial state from its own outputs, [B, N, H, K, V].

        To it comes what the state passes on: exp(log_transition)[..., None] * the gradient of the final state.
        """
        inputs = self._inputs
        dstates = sum_up(inputs.q, self._dout, *self._segments, dtype=inputs.dtype, forward=False)
        return dstates.mul_(inputs.scale)

    def log_transition(self) -> Tensor:
        """As the forward pass's, [B, N, H, 1 or K]."""
        return self._inputs.decay.log_transition()

    def local(self, initial_state: Tensor | None, *, need_decay_gradient: bool) -> None:
        """Compute what needs no gradient of a state: all states, and the first tiles' gradients from within chunks.

        Both arguments: as in the `finish` that follows.
        """
        for index, tile in enumerate(self._inputs.chunking.tiles[:AHEAD]):
            work = self._kept[index] = TileWork(self._inputs, tile)
            work.need_decay_gradient = need_decay_gradient
            _ = work.added_states, work.local_gradients
            work.forget_inputs()
        self._states = self._carried_states(initial_state)

    def finish(
        self,
        initial_state: Tensor | None,
        dfinal_state: Tensor | None,
        *,
        need_decay_gradient: bool,
        need_state_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of q, k, v, log_decay, each like its tensor, and of initial_state [B, N, H, K, V].

        initial_state, dfinal_state: [B, N, H, K, V], the states before each segment and the gradients of those after
        each, or None for zeros. What is not needed is spared, and None is returned for it.
        """
        inputs, tiles = self._inputs, self._inputs.chunking.tiles
        dleaving = inputs.by_segment(dfinal_state)
        dentering = _like(dleaving, inputs) if need_state_gradient else None
        results = [x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v)]
        if need_decay_gradient:
            results.append(inputs.decay.empty_gradient())
        states = self._carried_states(initial_state) if self._states is None else self._states
        carried = None
        for index, tile in reversed(list(enumerate(tiles))):
            work = self._kept.pop(index, None) or TileWork(inputs, tile)
            work.need_decay_gradient = need_decay_gradient
            _ = work.local_gradients
            work.overwrite = True
            dstates = work.added_gradients
            _carry_backward(work, dstates, carried=carried, dleaving=dleaving, dentering=dentering)
            carried = dstates[0]
            for gradient, x in zip(work.gradients(states.pop()[:-1], dstates[1:]), results, strict=True):
                tile.store(gradient, x)
        dlog_decay = inputs.decay.own_shape(results.pop()) if need_decay_gradient else None
        dq, dk, dv = results
        return dq, dk, dv, dlog_decay, None if dentering is None else inputs.by_row(dentering)

    def _carried_states(self, initial_state: Tensor | None) -> list[Tensor]:
        """For each tile the states before each of its chunks and after the last, [m + 1, H, K, V]."""
        entering = self._inputs.by_segment(initial_state)
        result: list[Tensor] = []
        for index, tile in enumerate(self._inputs.chunking.tiles):
            work = self._kept.get(index) or TileWork(self._inputs, tile, overwrite=True)
            carried = result[-1][-1] if result else None
            carry_forward(work, work.added_states, carried=carried, entering=entering, leaving=None)
            result.append(work.added_states)
        return result


def _like(states: Tensor | None, inputs: Inputs) -> Tensor:
    """What an empty segment passes through: a copy of the given states, or zeros."""
    return inputs.zero_states() if states is None else states.clone()


def carry_forward(
    work: TileWork, states: Tensor, *, carried: Tensor | None, entering: Tensor | None, leaving: Tensor | None
) -> None:
    """Turn what each chunk adds, in 1 ... m of `states` [m + 1, H, K, V], into the states before and after each chunk.

    carried [H, K, V]: the last state of the tile before, for a segment that goes on. entering, leaving
    [B * N, H, K, V]: the states before each segment (None: zeros) and, written here, after each (None: not asked for).
    """
    rows, through = states.unbind(0), work.decay.factors.through
    for run in work.tile.runs:
        # Row i is the state before chunk i and after chunk i - 1: a segment's last is copied before the next begins.
        given = _given(entering, run.segment) if run.first else carried
        _set(rows[run.chunk], given)
        for i in range(run.chunk + (given is None), run.stop):
            _add(rows[i + 1], rows[i], None if through is None else through[i])
        if run.last and leaving is not None:
            leaving[run.segment].copy_(rows[run.stop])


def _carry_backward(
    work: TileWork, dstates: Tensor, *, carried: Tensor | None, dleaving: Tensor | None, dentering: Tensor | None
) -> None:
    """`carry_forward` for gradients, from the last chunk to the first: chunks add in 0 ... m-1 of `dstates`."""
    rows, through = dstates.unbind(0), work.decay.factors.through
    for run in reversed(work.tile.runs):
        given = _given(dleaving, run.segment) if run.last else carried
        _set(rows[run.stop], given)
        for i in reversed(range(run.chunk, run.stop - (given is None))):
            _add(rows[i], rows[i + 1], None if through is None else through[i])
        if run.first and dentering is not None:
            dentering[run.segment].copy_(rows[run.chunk])


def _given(states: Tensor | None, segment: int) -> Tensor | None:
    return None if states is None else states[segment]


def _set(row: Tensor, state: Tensor | None) -> None:
    if state is None:
        row.zero_()
    else:
        row.copy_(state)


def _add(target: Tensor, source: Tensor, factor: Tensor | None) -> None:
    if factor is None:
        target.add_(source)
    else:
        target.addcmul_(source, factor)
