"""What one tile of the gated delta rule computes: everything but the states' way from chunk to chunk.

A chunk of C tokens with state S before it, in WY form ("Parallelizing Linear Transformers with the Delta Rule over
Sequence Length", Yang et al. 2024, section 3; with decays "Gated Delta Networks", section 3.3). What token i stores,

    u_i = beta_i (v_i - k_i exp(prefix_i) S - sum_{j < i} A_ij u_j),

is a triangular system for all tokens of the chunk, with the letters of `pairs.py` and linear_attention/decays.py:

    (I + diag(beta) A) U = diag(beta) (V - diag'(exp(prefix)) K S),   so U = U0 - W S

with U0 what is stored into an empty state and W what comes off it for the state that is there. With it

    O  = scale (Q exp(prefix)) S + P U
    S' = exp(total) S + (K exp(suffix))^T U         (S' after the chunk)
    M  = diag(exp(total)) - (K exp(suffix))^T W     (S' = M S + what is reached from zeros)

and backward, with D' the gradient of S', R solving (I + diag(beta) A)^T R = dU:

    dU = P^T dO + (K exp(suffix)) D',    D = exp(total) D' + (Q exp(prefix))^T dO - W^T dU
    dv = beta R,   dbeta = R . (V - K exp(prefix) S - A U),   dA = -beta R U^T,   dP = dO U^T
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule.pairs import pairs, pairs_backward
from longtrain.kernels.linear_attention import tiles as linear_tiles
from longtrain.kernels.linear_attention.chunking import Tile
from longtrain.kernels.linear_attention.decays import TileDecay
from longtrain.kernels.linear_attention.within_chunk import per_head, product, to_width


class Inputs(linear_tiles.Inputs):
    """What a pass is given, cut into chunks; arguments as of `DeltaRuleForward` and `DeltaRuleBackward`."""

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
        dout: Tensor | None = None,
    ) -> None:
        super().__init__(q, k, v, log_decay, offsets, scale=scale, dout=dout)
        self.beta = beta


class TileWork:
    """One tile of a pass; each part is computed once, when first asked for. [m, H, C, .] unless said otherwise."""

    def __init__(self, inputs: Inputs, tile: Tile) -> None:
        self._inputs, self.tile = inputs, tile

    def _load(self, x: Tensor) -> Tensor:
        return per_head(self.tile.load(x, self._inputs.dtype), self._inputs.heads)

    @cached_property
    def q(self) -> Tensor:
        """With the scale in it."""
        return self._load(self._inputs.q).mul_(self._inputs.scale)

    @cached_property
    def k(self) -> Tensor:
        return self._load(self._inputs.k)

    @cached_property
    def v(self) -> Tensor:
        return self._load(self._inputs.v)

    @cached_property
    def beta(self) -> Tensor:
        return self._load(self._inputs.beta[..., None])

    @cached_property
    def dout(self) -> Tensor:
        assert self._inputs.dout is not None, "only the backward pass asks for it"
        return self._load(self._inputs.dout)

    @cached_property
    def decay(self) -> TileDecay:
        return self._inputs.decay.of(self.tile)

    @cached_property
    def readers(self) -> Tensor:
        """Q exp(prefix)."""
        return _times(self.q, self.decay.factors.from_start)

    @cached_property
    def erasers(self) -> Tensor:
        """K exp(prefix): what reads the state that is there, to take it off."""
        return _times(self.k, self.decay.factors.from_start)

    @cached_property
    def written(self) -> Tensor:
        """K exp(suffix)."""
        return _times(self.k, self.decay.factors.to_end)

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """A and P."""
        return pairs(self.q, self.k, self.decay)

    @cached_property
    def system(self) -> Tensor:
        """diag(beta) A; the solver takes ones on the diagonal."""
        return self.beta * self.pairs[0]

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        right = self.beta * torch.cat((self.v, self.erasers), -1)
        both = torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)
        u, w = both.split((self.v.shape[3], self.k.shape[3]), -1)
        return u.contiguous(), w.contiguous()

    @property
    def u(self) -> Tensor:
        """U0, which `torch_impl` turns into U chunk by chunk, as the states become known."""
        return self._solved[0]

    @property
    def w(self) -> Tensor:
        return self._solved[1]

    @cached_property
    def du(self) -> Tensor:
        """P^T dO, which `torch_impl` turns into dU."""
        return product(self.pairs[1].transpose(2, 3), self.dout)

    @cached_property
    def added_gradients(self) -> Tensor:
        """(Q exp(prefix))^T dO, [m, H, K, V]."""
        return product(self.readers.transpose(2, 3), self.dout)

    def out(self, states: Tensor) -> Tensor:
        """O for the states [m, H, K, V] before each chunk, once `u` is U."""
        return product(self.readers, states).add_(product(self.pairs[1], self.u))

    def gradients(self, states: Tensor, dstates: Tensor, *, need_decay_gradient: bool) -> list[Tensor]:
        """The gradients of q, k [m, H, C, K], v, beta [m, H, C, 1] and, if needed, the log-decays, once `du` is dU.

        states, dstates [m, H, K, V]: the states before, and the gradients of those after each chunk.
        """
        factors, (a, p), u = self.decay.factors, self.pairs, self.u
        r = torch.linalg.solve_triangular(self.system.transpose(2, 3), self.du, upper=True, unitriangular=True)
        dv = self.beta * r
        r_u = product(r, u.transpose(2, 3))
        dbeta = (r * (self.v - product(self.erasers, states))).sum(-1, True) - (r_u * a).sum(-1, True)
        within = pairs_backward(
            self.q,
            self.k,
            a,
            p,
            r_u.mul_(-self.beta),
            product(self.dout, u.transpose(2, 3)),
            self.decay,
            need_decay_gradient=need_decay_gradient,
        )
        transposed = states.transpose(2, 3)
        dreaders, derasers = product(self.dout, transposed), product(dv, transposed).neg_()
        dwritten = product(u, dstates.transpose(2, 3))
        results = []
        if need_decay_gradient:
            width = self._inputs.decay.width
            gradient = self.decay.gradient(
                to_width((self.readers * dreaders).addcmul_(self.erasers, derasers), width),
                to_width(self.written * dwritten, width),
                to_width((states * dstates).sum(-1), width) * self.decay.total,
                pairs=within.pairs,
                levels=within.levels,
            )
            results.append(gradient)
        dq = within.dq.add_(_times(dreaders, factors.from_start)).mul_(self._inputs.scale)
        dk = within.dk.add_(_times(derasers, factors.from_start)).add_(_times(dwritten, factors.to_end))
        return [dq, dk, dv, dbeta, *results]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
