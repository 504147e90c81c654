"""What one tile computes: the parts of both passes that know no other tile. Shapes are those of `chunking.py`."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.linear_attention.chunking import Tile, chunked
from longtrain.kernels.linear_attention.decays import Decay, TileDecay
from longtrain.kernels.linear_attention.within_chunk import (
    Gradients,
    attend,
    attend_backward,
    flat,
    per_head,
    product,
    to_width,
)


class Inputs:
    """What a pass is given, cut into chunks; arguments as of `LinearAttentionForward` and `LinearAttentionBackward`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        *,
        scale: float,
        dout: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.v, self.dout, self.scale = q, k, v, dout, scale
        self.dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        self.heads = v.shape[2]
        self.chunking = chunked(
            offsets,
            rows=q.shape[0],
            heads=self.heads,
            key_width=q.shape[3],
            value_width=v.shape[3],
            on_cpu=q.device.type == "cpu",
        )
        self.decay = Decay(log_decay, v, self.chunking, dtype=self.dtype)

    def zero_states(self) -> Tensor:
        """[B * N, H, K, V]."""
        segments = self.chunking.rows * len(self.chunking.lengths)
        return self.v.new_zeros((segments, self.heads, self.q.shape[3], self.v.shape[3]), dtype=self.dtype)

    def by_segment(self, states: Tensor | None) -> Tensor | None:
        """[B, N, H, K, V] in any dtype as [B * N, H, K, V] in the state dtype."""
        return None if states is None else states.to(self.dtype).flatten(0, 1)

    def by_row(self, states: Tensor) -> Tensor:
        """[B * N, H, K, V] as [B, N, H, K, V]."""
        return states.view(self.chunking.rows, len(self.chunking.lengths), *states.shape[1:])


class TileWork:
    """One tile of a pass; each part is computed once, when first asked for.

    need_decay_gradient: whether `local_gradients` and `gradients` have to give it.
    overwrite: q and k may be overwritten, since nobody will ask any more for what needs them as they are.
    """

    def __init__(self, inputs: Inputs, tile: Tile, *, overwrite: bool = False) -> None:
        self.tile = tile
        self.need_decay_gradient, self.overwrite = False, overwrite
        self._inputs = inputs
        # Scores are computed once for all heads that share q and k, but per head where these are not shared alike.
        self._shared = inputs.q.shape[2] == inputs.k.shape[2]

    @cached_property
    def q(self) -> Tensor:
        """With the scale in it; [m, G, C, K] where q and k are shared alike."""
        q = self.tile.load(self._inputs.q, self._inputs.dtype).mul_(self._inputs.scale)
        return q if self._shared else per_head(q, self._inputs.heads)

    @cached_property
    def k(self) -> Tensor:
        """[m, G, C, K] where q and k are shared alike."""
        k = self.tile.load(self._inputs.k, self._inputs.dtype)
        return k if self._shared else per_head(k, self._inputs.heads)

    @cached_property
    def v(self) -> Tensor:
        return self.tile.load(self._inputs.v, self._inputs.dtype)

    @cached_property
    def dout(self) -> Tensor:
        assert self._inputs.dout is not None, "only the backward pass asks for it"
        return self.tile.load(self._inputs.dout, self._inputs.dtype)

    @cached_property
    def decay(self) -> TileDecay:
        return self._inputs.decay.of(self.tile)

    @cached_property
    def readers(self) -> Tensor:
        """q_i exp(prefix_i), for each head."""
        return self._scaled(self.q, self.decay.factors.from_start)

    @cached_property
    def written(self) -> Tensor:
        """k_j exp(suffix_j), for each head."""
        return self._scaled(self.k, self.decay.factors.to_end)

    @cached_property
    def added_states(self) -> Tensor:
        """[m + 1, H, K, V]: in 1 ... m what each chunk adds to the state after it; 0 is not yet written."""
        return _outer_products(self.written, self.v, first=1)

    @cached_property
    def added_gradients(self) -> Tensor:
        """[m + 1, H, K, V]: in 0 ... m-1 what each chunk adds to the gradient of the state before it."""
        return _outer_products(self.readers, self.dout, first=0)

    @cached_property
    def local_out(self) -> Tensor:
        """Outputs from within chunks, [m, H, C, V]."""
        return attend(self.q, self.k, self.v, self.decay)

    @cached_property
    def local_gradients(self) -> Gradients:
        """Gradients from within chunks."""
        need = self.need_decay_gradient
        return attend_backward(self.q, self.k, self.v, self.dout, self.decay, need_decay_gradient=need)

    def out(self, states: Tensor) -> Tensor:
        """All outputs [m, H, C, V]; states [m, H, K, V] before each chunk. Uses up `local_out`."""
        flat(self.local_out).baddbmm_(flat(self.readers), flat(states))
        return self.local_out

    def gradients(self, states: Tensor, dstates: Tensor) -> list[Tensor]:
        """All gradients, of q, k, v and, if needed, the log-decays. Uses up `local_gradients`.

        states, dstates [m, H, K, V]: the states before, and the gradients of those after each chunk.
        Returns [m, G or H, C, K] twice, [m, H, C, V], and [m, H, C, 1 or K].
        """
        factors, local = self.decay.factors, self.local_gradients
        dreaders = product(self.dout, states.transpose(2, 3))
        dwritten = product(self.v, dstates.transpose(2, 3))
        flat(local.dv).baddbmm_(flat(self.written), flat(dstates))
        dlog = []
        if self.need_decay_gradient:
            width = self._inputs.decay.width
            gradient = self.decay.gradient(
                to_width(self.readers * dreaders, width),
                to_width(self.written * dwritten, width),
                to_width((states * dstates).sum(-1), width) * self.decay.total,
                pairs=local.pairs,
                levels=local.levels,
            )
            dlog.append(gradient)
        dq = _add_times(local.dq, dreaders, factors.from_start).mul_(self._inputs.scale)
        return [dq, _add_times(local.dk, dwritten, factors.to_end), local.dv, *dlog]

    def forget_inputs(self) -> None:
        """Free what was loaded. A later stage loads again what it needs, which takes no longer than keeping it."""
        for name in ("q", "k", "v", "dout", "readers", "written"):
            self.__dict__.pop(name, None)

    def _scaled(self, x: Tensor, factor: Tensor | None) -> Tensor:
        x = per_head(x, self._inputs.heads)
        if factor is None:
            return x
        return x.mul_(factor) if self.overwrite else x * factor


def _outer_products(a: Tensor, b: Tensor, *, first: int) -> Tensor:
    """sum_t a_t b_t^T of each chunk, a [m, H, C, K], b [m, H, C, V], in `first` ... of [m + 1, H, K, V]."""
    m, heads, _, key_width = a.shape
    products = a.new_empty((m + 1, heads, key_width, b.shape[3]))
    torch.bmm(flat(a).transpose(1, 2), flat(b), out=flat(products[first : first + m]))
    return products


def _add_times(x: Tensor, y: Tensor, factor: Tensor | None) -> Tensor:
    """x += y * factor, summed over the heads that share one of x's."""
    if x.shape[1] != y.shape[1]:
        y = y if factor is None else y * factor
        return x.add_(y.unflatten(1, (x.shape[1], -1)).sum(2))
    return x.add_(y) if factor is None else x.addcmul_(y, factor)
