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

Where an input may be NaN or inf (`containment.py`), tokens with a bad k, beta or log-decay are marked: A is 0 wherever
such a token lies from j to i, so that the system can be solved between them, and their decays count as none among
pairs. What they reach is NaN by way of W and U (forward) and of R (backward).
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule import containment
from longtrain.kernels.gated_delta_rule.containment import backward_product, forward_product, without
from longtrain.kernels.gated_delta_rule.pairs import key_pairs, pairs_backward, query_pairs
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
    def _given_beta(self) -> Tensor:
        return self._load(self._inputs.beta[..., None])

    @cached_property
    def contained(self) -> bool:
        """Whether numbers may be there that must be kept from tokens that do not see them."""
        given = [self.k, self.v, self._given_beta]
        if self._inputs.dout is not None:
            given += [self.q, self.dout]
        log = self._inputs.decay.given
        if log is not None:  # -inf is one as good as any
            given.append(self.decay.log.clamp(min=-1.0))
        return not containment.all_finite(*given)

    @cached_property
    def beta(self) -> Tensor:
        """NaN for marked tokens."""
        beta = self._given_beta
        return containment.marked(beta, self.k, self.decay.log) if self.contained else beta

    @cached_property
    def _pair_decay(self) -> TileDecay:
        """`decay` without NaN."""
        decay = self.decay
        if not self.contained or self._inputs.decay.given is None:
            return decay
        return decay.with_log(decay.log.nan_to_num(nan=0.0, neginf=-torch.inf))

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
    def a(self) -> Tensor:
        """A."""
        a = key_pairs(self.k, self._pair_decay)
        return a.masked_fill_(containment.divided(self.beta.isnan()), 0) if self.contained else a

    @cached_property
    def p(self) -> Tensor:
        """P."""
        return query_pairs(self.q, self.k, self._pair_decay)

    @cached_property
    def system(self) -> Tensor:
        """diag(beta) A; the solver takes ones on the diagonal."""
        return (without(self.beta) if self.contained else self.beta) * self.a

    def _solve(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.system, right, upper=False, unitriangular=True)

    def _solve_transposed(self, right: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.system.transpose(2, 3), right, upper=True, unitriangular=True)

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        right = self.beta * torch.cat((self.v, self.erasers), -1)
        both = forward_product(self._solve, right) if self.contained else self._solve(right)
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
        transposed = self.p.transpose(2, 3)
        if self.contained:
            return backward_product(lambda dout: product(transposed, dout), self.dout)
        return product(transposed, self.dout)

    @cached_property
    def added_gradients(self) -> Tensor:
        """(Q exp(prefix))^T dO, [m, H, K, V]."""
        return product(self.readers.transpose(2, 3), self.dout)

    def out(self, states: Tensor) -> Tensor:
        """O for the states [m, H, K, V] before each chunk, once `u` is U."""
        if self.contained:
            within = forward_product(lambda u: product(self.p, u), self.u)
        else:
            within = product(self.p, self.u)
        return product(self.readers, states).add_(within)

    def gradients(self, states: Tensor, dstates: Tensor, *, need_decay_gradient: bool) -> list[Tensor]:
        """The gradients of q, k [m, H, C, K], v, beta [m, H, C, 1] and, if needed, the log-decays, once `du` is dU.

        states, dstates [m, H, K, V]: the states before, and the gradients of those after each chunk.
        """
        factors, a, p, u = self.decay.factors, self.a, self.p, self.u
        q, k = self.q, self.k
        if self.contained:
            q, k = without(q), without(k)
            r = backward_product(self._solve_transposed, self.du, self.beta.isnan())
        else:
            r = self._solve_transposed(self.du)
        dv = self.beta * r
        r_u = product(r, u.transpose(2, 3)).tril_(-1)
        dbeta = (r * (self.v - product(self.erasers, states))).sum(-1, True) - (r_u * a).sum(-1, True)
        within = pairs_backward(
            q,
            k,
            a,
            p,
            r_u.mul_(-self.beta),
            product(self.dout, u.transpose(2, 3)),
            self._pair_decay,
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

    def forget(self, *kept: str) -> None:
        """Free all but U and W and what is `kept`; a later stage computes again what it needs."""
        for name in self.__dict__.keys() - {"tile", "_inputs", "contained", "_solved", *kept}:
            del self.__dict__[name]


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
