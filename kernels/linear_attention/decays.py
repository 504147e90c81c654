"""What decays do inside a tile: factors from a chunk's start, to its end, through it, and between its tokens.

With g_t the log-decays of a chunk's tokens 0 ... C-1 (0 where it is padded), one number per head or one per channel:

    prefix_i     = g_0 + ... + g_i          what the state before the chunk has lost when token i reads it
    suffix_j     = g_{j+1} + ... + g_{C-1}  what k_j v_j^T will have lost at the chunk's end
    total        = g_0 + ... + g_{C-1}      what the state loses over the chunk
    between_{ij} = g_{j+1} + ... + g_i      what k_j v_j^T has lost when token i reads it, j <= i

Each is a sum of its own terms and never the difference of two others, except `between` for one number per head, where
a difference is much cheaper: that is done in float64, with strong decays clamped. So nothing overflows, log-decays of
-inf work, a strong decay costs its neighbours no precision, and a NaN reaches only the sums that contain it.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.kernels.linear_attention.chunking import Chunking, Tile

# Where `between` is used as a matrix (never for decays per channel). It makes 0 * NaN, which only a CPU can be asked
# about without waiting; and CUDA has no deterministic running sums, which its gradient needs.
_MATRIX_DEVICES = ("cpu",)

# exp of it is 0 in float64 too, and 64 times it, in float64, leaves its neighbours exact to 1e-11.
_STRONGEST = -1000.0


class Factors(NamedTuple):
    """Exponentials that join chunks; None stands for ones everywhere."""

    from_start: Tensor | None  # exp(prefix), [m or 1, H, C, 1 or K]
    to_end: Tensor | None  # exp(suffix), the same
    through: Sequence[Tensor] | None  # exp(total) of each chunk, [H, 1 or K, 1]


class TileDecay:
    """The decays of one tile, each part computed when first asked for.

    load: gives the log-decays [m, H, C, 1 or K]. matrix: whether `between` is wanted. factors, between: what is known
    without looking at the log-decays.
    """

    def __init__(
        self,
        load: Callable[[], Tensor],
        *,
        matrix: bool,
        factors: Factors | None = None,
        between: Tensor | None = None,
    ) -> None:
        self._load, self._matrix, self._factors, self._between = load, matrix, factors, between

    def with_log(self, log: Tensor) -> "TileDecay":
        """The same for other log-decays."""
        return TileDecay(lambda: log, matrix=self._matrix)

    @cached_property
    def log(self) -> Tensor:
        """g, [m, H, C, 1 or K], 0 where a chunk is padded."""
        return self._load()

    @cached_property
    def halvings(self) -> "Halvings":
        return Halvings(self.log)

    @cached_property
    def factors(self) -> Factors:
        if self._factors is not None:
            return self._factors
        if self._matrix:
            log = self.log.squeeze(-1)
            prefix = log.cumsum(-1)
            suffix = F.pad(_sums_from(log, -1)[..., 1:], (0, 1))
            prefix, suffix, total = prefix[..., None], suffix[..., None], prefix[..., -1, None]
        else:
            prefix, suffix, total = self.halvings.prefix, self.halvings.suffix, self.halvings.total
        return Factors(exponentials(prefix), exponentials(suffix), exponentials(total)[..., None].unbind(0))

    @cached_property
    def between(self) -> Tensor | None:
        """exp(between) [m or 1, H or 1, C, C], 0 for j > i; None where `halvings` are to be used instead."""
        if not self._matrix or self._between is not None:
            return self._between
        sums = self.log.squeeze(-1).to(torch.float64).clamp_(min=_STRONGEST).cumsum(-1)
        between = (sums[..., :, None] - sums[..., None, :]).to(self.log.dtype)
        # Above the diagonal the clamp keeps exp from overflowing.
        self._between = exponentials(between.clamp_(max=0)).tril_()
        return self._between

    @property
    def total(self) -> Tensor:
        """exp(total) as [m, H, 1 or K]."""
        assert self.factors.through is not None, "only asked for where there is a decay"
        return torch.stack(list(self.factors.through)).squeeze(-1)

    def gradient(
        self, d_prefix: Tensor, d_suffix: Tensor, d_total: Tensor, *, pairs: Tensor | None, levels: "LevelGradients"
    ) -> Tensor:
        """The gradient of g, [m, H, C, 1 or K], from those of the sums that it is in.

        d_prefix, d_suffix [m, H, C, 1 or K]; d_total [m, H, 1 or K]; and from inside the chunk either pairs
        [m, H, C, C], the gradient of `between` (used for j < i only), or levels, those of `halvings`.

        Every term is added where it belongs, and none is added first and subtracted later: the usual
        sum_{s >= t} (q_s dq_s - k_s dk_s) loses 1e-5 in float32 to terms that cancel.
        """
        if pairs is None:
            return self.halvings.gradient(d_prefix, d_suffix, d_total, levels)
        g = d_total[..., None, :] + _sums_from(d_prefix, -2)
        # Token t's g is in between_ij for j < t <= i.
        within = pairs.cumsum(-1).tril_(-1).sum(-2)
        g[..., 1:, :] += (d_suffix.cumsum(-2) + within[..., None])[..., :-1, :]
        return g


class Level(NamedTuple):
    """Blocks of 2 * half tokens whose second half reads their first, [m * H * C / (2 * half), half, 1 or K]."""

    half: int
    rise: Tensor  # exp(sum of g from the middle to the reading token)
    fall: Tensor  # exp(sum of g from behind the written token to the middle)


LevelGradients = Sequence[tuple[Tensor, Tensor]]
"""For each level the gradients of log rise and log fall."""


class Halvings:
    """A chunk halved again and again: any i > j lie in the two halves of exactly one block.

    There exp(between_ij) is rise_i * fall_j, both at most 1. And since all of a block's second half sees all of its
    first, nothing has to be masked: no exponent above 0, no 0 * NaN.
    """

    def __init__(self, log: Tensor) -> None:
        size, width = log.shape[-2:]
        self.prefix, self.suffix, total = log.clone(), torch.zeros_like(log), log
        self.levels: list[Level] = []
        half = 1
        while half < size:
            first, second = lower(self.suffix, half), upper(self.prefix, half)  # sums within each half so far
            self.levels.append(Level(half, exponentials(second), exponentials(first)))
            total = total.reshape(-1, 2, width)
            second += total[:, :1]
            first += total[:, 1:]
            total = total.sum(1)
            half *= 2
        self.total = total.view(*log.shape[:2], width)

    def gradient(self, d_prefix: Tensor, d_suffix: Tensor, d_total: Tensor, levels: LevelGradients) -> Tensor:
        """`TileDecay.gradient`: the constructor run backwards."""
        d_prefix, d_suffix = d_prefix.clone(), d_suffix.clone()
        d_total = d_total.reshape(-1, d_total.shape[-1])
        for level, (d_rise, d_fall) in zip(reversed(self.levels), reversed(levels), strict=True):
            first, second = lower(d_suffix, level.half), upper(d_prefix, level.half)
            d_total = torch.stack((d_total + second.sum(1), d_total + first.sum(1)), 1).flatten(0, 1)
            second += d_rise
            first += d_fall
        return d_prefix + d_total.view_as(d_prefix)


def lower(x: Tensor, half: int) -> Tensor:
    """The first halves of the blocks of 2 * half tokens: a view [blocks, half, K] of contiguous x [m, H, C, K]."""
    return x.view(-1, 2, half, x.shape[-1])[:, 0]


def upper(x: Tensor, half: int) -> Tensor:
    """The second halves."""
    return x.view(-1, 2, half, x.shape[-1])[:, 1]


class Decay:
    """The decays of one call; `of(tile)` gives those of a tile.

    log_decay: None, [H], [B, T, H] or [B, T, H, K]; values [B, T, H, V]; dtype: that of states, float32 or float64.
    """

    def __init__(self, log_decay: Tensor | None, values: Tensor, chunking: Chunking, *, dtype: torch.dtype) -> None:
        self.given = log_decay
        self._log_decay = log_decay[..., None] if log_decay is not None and log_decay.ndim == 3 else log_decay
        self._values, self._chunking, self._dtype = values, chunking, dtype
        self.width = log_decay.shape[3] if log_decay is not None and log_decay.ndim == 4 else 1
        self._matrix = self.width == 1 and values.device.type in _MATRIX_DEVICES
        size, device = chunking.size, values.device
        self._between = None
        if log_decay is None and self._matrix:
            self._between = torch.ones(size, size, dtype=dtype).tril_()[None, None]
        elif log_decay is not None and log_decay.ndim == 1:
            steps = torch.arange(size + 1, device=device)
            powers = exponentials(log_decay[:, None].to(torch.float64) * steps, dtype)  # [H, C + 1]
            powers[:, 0].fill_(1)  # 0 * -inf is not 0
            backwards = powers[:, :-1].flip(1)
            if self._matrix:  # row i is a window into the powers C-1 ... 1, 0 and then zeros: it begins with power i
                self._between = F.pad(backwards, (0, size - 1)).unfold(1, size, 1).flip(1)[None]
            self._from_start = powers[None, :, 1:, None]
            self._to_end = backwards[None, ..., None]
            self._powers = powers[..., None, None].unbind(1)

    def of(self, tile: Tile) -> TileDecay:
        """The decays of one tile."""
        log_decay = self._log_decay
        if log_decay is None:
            return TileDecay(
                lambda: self._fixed_log(tile, torch.zeros((), dtype=self._dtype, device=self._values.device)),
                matrix=self._matrix,
                factors=Factors(None, None, None),
                between=self._between,
            )
        if log_decay.ndim == 1:
            to_end = self._to_end
            through = [self._powers[tile.size]] * tile.chunks
            short = [run for run in tile.runs if run.rest]
            if short:  # a short chunk ends at its own last token
                to_end = to_end.repeat(tile.chunks, 1, 1, 1)
                for run in short:
                    to_end[run.stop - 1, :, : run.rest] = self._to_end[0, :, tile.size - run.rest :]
                    through[run.stop - 1] = self._powers[run.rest]
            return TileDecay(
                lambda: self._fixed_log(tile, log_decay.to(self._dtype)),
                matrix=self._matrix,
                factors=Factors(self._from_start, to_end, through),
                between=self._between,
            )
        return TileDecay(lambda: tile.load(log_decay, self._dtype), matrix=self._matrix)

    def log_transition(self) -> Tensor:
        """The sum of log_decay over each segment, [B, N, H, 1 or K]. It may be -inf: add it, never subtract it."""
        log_decay, lengths = self._log_decay, self._chunking.lengths
        rows, _, heads, _ = self._values.shape
        if log_decay is None or not len(lengths):
            return self._values.new_zeros((rows, len(lengths), heads, self.width), dtype=self._dtype)
        if log_decay.ndim == 1:
            g = log_decay.to(self._dtype)
            sums = [g * length if length else torch.zeros_like(g) for length in lengths.tolist()]
            return torch.stack(sums)[None, ..., None].expand(rows, -1, -1, -1)
        return torch.stack([x.sum(1) for x in log_decay.to(self._dtype).split(lengths.tolist(), dim=1)], 1)

    def empty_gradient(self) -> Tensor:
        """[B, T, H, 1 or K], for the gradients of the tokens' log-decays."""
        return self._values.new_empty((*self._values.shape[:3], self.width), dtype=self._dtype)

    def own_shape(self, gradient: Tensor) -> Tensor:
        """The gradient of the tokens' log-decays, [B, T, H, 1 or K], as that of log_decay, in its shape and dtype."""
        given = self.given
        assert given is not None, "only asked for where there is a decay"
        if given.ndim == 1:
            gradient = gradient.sum((0, 1), dtype=torch.float64)
        return gradient.reshape(given.shape).to(given.dtype)

    def _fixed_log(self, tile: Tile, g: Tensor) -> Tensor:
        """The same log-decay [H] at every token of a tile, as [m, H, C, 1], 0 where a chunk is padded."""
        log = g[..., None, None].expand(self._values.shape[2], tile.size, 1).repeat(tile.chunks, 1, 1, 1)
        for run in tile.runs:
            if run.rest:
                log[run.stop - 1, :, run.rest :] = 0
        return log


def exponentials(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """exp(x) in `dtype`, but 0 where that is so small (4e-31 in float32) that products with it would be denormal.

    Such numbers make a CPU five times slower. What has decayed that far is below any rounding of what has not.
    """
    smallest = 0.8 * math.log(torch.finfo(dtype or x.dtype).tiny)
    return F.threshold(x, smallest, -torch.inf).exp_().to(dtype or x.dtype)


def _sums_from(x: Tensor, dim: int) -> Tensor:
    """At each index the sum over it and all later ones."""
    return x.flip(dim).cumsum(dim).flip(dim)
