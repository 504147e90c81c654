"""The gated delta rule by chunks in WY form, as matrix products: constant time per token, memory linear in T.

`tiles.py` has the equations, and computes whatever needs no other chunk for many chunks at once; here the states go
from chunk to chunk:

    U = U0 - W S,   S' = exp(total) S + (K exp(suffix))^T U                        forward
    dU += (K exp(suffix)) D',   D = exp(total) D' + (Q exp(prefix))^T dO - W^T dU  backward, from the last chunk

Each pass is a class with stages, so that a sequence spread over ranks can send what its segments sum up to before the
rest is computed: `summaries()`, then `local(...)` while messages travel, which computes what needs no state (and in
backward all states, since those that enter are known from forward), then `finish(...)`. Between the stages a tile keeps
U0 and W (and P, where `local` computed it), as large as k and v, and the rest is computed again: a tenth to a third
more time for a quarter to two fifths of the memory (docs/benchmarks/mixers_cpu.md). `finish` alone goes tile by tile
and keeps no tile. An object finishes once. Backward keeps nothing of forward but its inputs.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule.tiles import Inputs, TileWork
from longtrain.kernels.linear_attention.torch_impl import AHEAD


class DeltaRuleForward:
    """The forward pass over segments: runs of consecutive tokens, each with a state of its own.

    q, k [B, T, G, K], v [B, T, H, V], beta [B, T, H], in any dtypes; log_decay None, [B, T, H] or [B, T, H, K], <= 0;
    offsets: int64 numpy [N+1], boundaries of the N segments, from 0 to T, the same for every row; scale: multiplies q.
    States are [B, N, H, K, V] in the state dtype: float64 if q, k or v is, otherwise float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        *,
        scale: float,
    ) -> None:
        self._inputs = Inputs(q, k, v, beta, log_decay, offsets, scale=scale)
        self._kept: dict[int, TileWork] = {}

    def summaries(self) -> tuple[Tensor, Tensor]:
        """What takes a state through a segment: S_out = transition @ S_in + state.

        Returns transition [B, N, H, K, K], the product over the segment with later tokens on the left, and state
        [B, N, H, K, V], what the segment reaches from zeros. Of an empty segment: the identity and 0.
        """
        inputs = self._inputs
        state = inputs.zero_states()
        width = state.shape[2]
        identity = torch.eye(width, dtype=state.dtype, device=state.device)
        # The transition is what becomes of the identity where nothing new is stored: more columns of a state.
        both = torch.cat((identity.expand(*state.shape[:2], width, width), state), -1)
        for index, tile in enumerate(inputs.chunking.tiles):
            work = self._kept[index] = TileWork(inputs, tile)
            through, stored, w, written = _through(work), work.u.unbind(0), work.w.unbind(0), work.written.unbind(0)
            for run in work.tile.runs:
                for i in range(run.chunk, run.stop):
                    u = torch.matmul(w[i], both[run.segment]).neg_()
                    u[..., width:] += stored[i]
                    both[run.segment] = torch.baddbmm(
                        _times(both[run.segment], through, i), written[i].transpose(1, 2), u
                    )
            work.forget()
        return inputs.by_row(both[..., :width].contiguous()), inputs.by_row(both[..., width:].contiguous())

    def local(self) -> None:
        """Compute what needs no state and the summaries had no use for: P of the first tiles."""
        for index, tile in enumerate(self._inputs.chunking.tiles[:AHEAD]):
            work = self._kept.setdefault(index, TileWork(self._inputs, tile))
            _ = work.p
            work.forget("p")

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
            states, carried = carry_forward(work, carried=carried, entering=entering, leaving=leaving)
            tile.store(work.out(states), out)
        return out, None if leaving is None else inputs.by_row(leaving)


class DeltaRuleBackward:
    """The backward pass. Arguments as of `DeltaRuleForward`; dout [B, T, H, V], the gradient of its outputs."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        dout: Tensor,
        *,
        scale: float,
    ) -> None:
        self._inputs = Inputs(q, k, v, beta, log_decay, offsets, scale=scale, dout=dout)
        self._kept: dict[int, TileWork] = {}
        self._states: list[tuple[Tensor, Tensor]] | None = None

    def summaries(self) -> Tensor:
        """The gradient of each segment's initial state from its own outputs, [B, N, H, K, V], whatever that state is.

        To it comes what the state passes on: transition^T @ the gradient of the final state, with forward's transition.
        """
        inputs = self._inputs
        dstates = inputs.zero_states()
        for index, tile in reversed(list(enumerate(inputs.chunking.tiles))):
            work = self._kept[index] = TileWork(inputs, tile)
            du = work.du
            for run in reversed(work.tile.runs):
                dstate = dstates[run.segment]
                for i in reversed(range(run.chunk, run.stop)):
                    dstate = _back(work, i, dstate, du[i])
                dstates[run.segment] = dstate
            work.forget()
        return inputs.by_row(dstates)

    def local(self, initial_state: Tensor | None) -> None:
        """Compute what needs no gradient of a state: all states; from those before each segment, as in `finish`."""
        entering, carried = self._inputs.by_segment(initial_state), None
        self._states = []
        for index, tile in enumerate(self._inputs.chunking.tiles):
            work = self._kept.get(index) or TileWork(self._inputs, tile)
            states, carried = carry_forward(work, carried=carried, entering=entering, leaving=None)
            self._states.append((states, work.u))
            work.forget()

    def finish(
        self,
        initial_state: Tensor | None,
        dfinal_state: Tensor | None,
        *,
        need_decay_gradient: bool,
        need_state_gradient: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of q, k, v, beta, log_decay, each like its tensor, and of initial_state [B, N, H, K, V].

        initial_state, dfinal_state: [B, N, H, K, V], the states before each segment and the gradients of those after
        each, or None for zeros. What is not needed is spared, and None is returned for it.
        """
        inputs, tiles = self._inputs, self._inputs.chunking.tiles
        if self._states is None:
            self.local(initial_state)
        assert self._states is not None
        dleaving = inputs.by_segment(dfinal_state)
        dentering = _like(dleaving, inputs) if need_state_gradient else None
        results = [x.new_empty(x.shape) for x in (inputs.q, inputs.k, inputs.v, inputs.beta[..., None])]
        if need_decay_gradient:
            results.append(inputs.decay.empty_gradient())
        carried = None
        for index, tile in reversed(list(enumerate(tiles))):
            work = self._kept.pop(index, None) or TileWork(inputs, tile)
            states, stored = self._states.pop()
            if work.u is not stored:
                work.u.copy_(stored)
            dstates, carried = _carry_backward(work, carried=carried, dleaving=dleaving, dentering=dentering)
            gradients = work.gradients(states, dstates, need_decay_gradient=need_decay_gradient)
            for gradient, x in zip(gradients, results, strict=True):
                tile.store(gradient, x)
        dlog_decay = inputs.decay.own_shape(results.pop()) if need_decay_gradient else None
        dq, dk, dv, dbeta = results
        return dq, dk, dv, dbeta.squeeze(-1), dlog_decay, None if dentering is None else inputs.by_row(dentering)


def _like(states: Tensor | None, inputs: Inputs) -> Tensor:
    """What an empty segment passes through: a copy of the given states, or zeros."""
    return inputs.zero_states() if states is None else states.clone()


def carry_forward(
    work: TileWork, *, carried: Tensor | None, entering: Tensor | None, leaving: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The states before each of a tile's chunks [m, H, K, V] and the one after the last [H, K, V]; turns U0 into U.

    carried [H, K, V]: the last state of the tile before, for a segment that goes on. entering, leaving
    [B * N, H, K, V]: the states before each segment (None: zeros) and, written here, after each (None: not asked for).
    """
    stored, w, written, through = work.u.unbind(0), work.w.unbind(0), work.written.unbind(0), _through(work)
    heads, key_width, value_width = work.k.shape[1], work.k.shape[3], work.v.shape[3]
    states = work.u.new_empty((work.tile.chunks, heads, key_width, value_width))
    state = states.new_zeros(states.shape[1:])
    for run in work.tile.runs:
        if run.first:
            state = torch.zeros_like(state) if entering is None else entering[run.segment]
        else:
            assert carried is not None
            state = carried
        for i in range(run.chunk, run.stop):
            states[i] = state
            stored[i].baddbmm_(w[i], state, alpha=-1)
            state = torch.baddbmm(_times(state, through, i), written[i].transpose(1, 2), stored[i])
        if run.last and leaving is not None:
            leaving[run.segment] = state
    return states, state


def _carry_backward(
    work: TileWork, *, carried: Tensor | None, dleaving: Tensor | None, dentering: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each of a tile's chunks, and of that before the first; turns P^T dO into dU."""
    dstates = torch.empty_like(work.added_gradients)
    dstate = dstates.new_zeros(dstates.shape[1:])
    for run in reversed(work.tile.runs):
        if run.last:
            dstate = torch.zeros_like(dstate) if dleaving is None else dleaving[run.segment]
        else:
            assert carried is not None
            dstate = carried
        for i in reversed(range(run.chunk, run.stop)):
            dstates[i] = dstate
            dstate = _back(work, i, dstate, work.du[i])
        if run.first and dentering is not None:
            dentering[run.segment] = dstate
    return dstates, dstate


def _back(work: TileWork, i: int, dstate: Tensor, du: Tensor) -> Tensor:
    """The gradient of the state before chunk i from that of the one after it; adds to du [H, C, V]."""
    du.baddbmm_(work.written[i], dstate)
    before = _times(dstate, _through(work), i) + work.added_gradients[i]
    return before.baddbmm_(work.w[i].transpose(1, 2), du, alpha=-1)


def _through(work: TileWork) -> Sequence[Tensor] | None:
    return work.decay.factors.through


def _times(state: Tensor, through: Sequence[Tensor] | None, chunk: int) -> Tensor:
    return state if through is None else state * through[chunk]
