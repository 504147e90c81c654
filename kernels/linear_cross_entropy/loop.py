"""The loop over blocks of tokens and of vocabulary that all fast paths share: the logits are never whole.

With logits z_nv (after the softcap c), lse_n = log sum_v exp(z_nv) and the gradient d_n of token n's loss,

    dz_nv = d_n ((1 + 2 z_loss lse_n) exp(z_nv - lse_n) - [v = target(n)])     with a softcap times 1 - (z_nv / c)^2
    dhidden = dz weight,  dweight = dz^T hidden                                 [N, D], [vocabulary, D]

A tile is a block of tokens times a block of vocabulary. Its logits come from one large matrix product with float32
results. Forward, they go into each token's running maximum and sum ("Online normalizer calculation for softmax",
Milakov and Gimelshein 2018, algorithm 3). Backward, they are computed again, turned into dz in place of them, and two
more products add it to the gradients, which are summed up in float32 and rounded once. That is four products in all,
the fewest without keeping the logits. How a tile is read and turned is left to `Steps`: PyTorch's operators or Triton.

One of the two gradients is complete when a block's row or column of tiles is done, the other one only at the end, and
until then needs room in float32: that is the smaller of the two, 4 D min(N, vocabulary) bytes.

What an ignored token holds is never looked at: its hidden counts as 0, so that not even a NaN there goes anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longtrain.kernels import launching

HALVES = (torch.float16, torch.bfloat16)
Block = tuple[int, int]  # first and stop


@dataclass(frozen=True)
class Options:
    """What is added to the plain loss; see `linear_cross_entropy`."""

    ignore_index: int
    z_loss: float
    softcap: float | None


class Steps(Protocol):
    """What is done with the logits [n, m] of a tile, float32 or float64; `first` is the vocabulary's index of column 0.

    targets: int64 [n], -1 where ignored. Other vectors: [n], in the logits' dtype. logits may be overwritten.
    """

    def sum_up(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        maximum: Tensor,
        total: Tensor,
        own: Tensor,
    ) -> None:
        """Take up the tile: maximum of all logits so far, total of exp(logit - maximum), `own` logit of the target."""
        ...

    def differentiate(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        first: int,
        softcap: float | None,
        lse: Tensor,
        scale: Tensor,
        dlosses: Tensor,
        out: Tensor,
    ) -> None:
        """Write dz = scale exp(z - lse) - dlosses [v = target] to `out` [n, m], which may be the logits themselves."""
        ...


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, options: Options, steps: Steps, sizes: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The loss of each token and the log of its sum of exponentials, both [N], both 0 where ignored.

    hidden [N, D], weight [vocabulary, D], targets int64 [N]; sizes: tokens and vocabulary of a tile, at most.
    """
    operand, dtype = dtypes(hidden, weight)
    counts = targets != options.ignore_index
    targets = torch.where(counts, targets, -1)
    token_blocks, vocabulary_blocks = _blocks(hidden, sizes[0]), _blocks(weight, sizes[1])
    tile = _buffer(hidden, token_blocks, vocabulary_blocks, dtype)
    maximum = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=dtype)
    total = torch.zeros_like(maximum)
    own = torch.full_like(maximum, torch.nan)  # of a target that does not exist, where nobody checks
    for start, stop in token_blocks:
        rows, mine = hidden[start:stop].to(operand), slice(start, stop)
        for first, last in vocabulary_blocks:
            logits = tile[: stop - start, : last - first]
            multiply(rows, weight[first:last].to(operand).t(), logits)
            steps.sum_up(
                logits,
                targets[mine],
                first=first,
                softcap=options.softcap,
                maximum=maximum[mine],
                total=total[mine],
                own=own[mine],
            )
    lse = maximum + total.log()
    losses = lse - own + options.z_loss * lse.square() if options.z_loss else lse - own
    return torch.where(counts, losses, 0), torch.where(counts, lse, 0)


def backward(
    dlosses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    options: Options,
    steps: Steps,
    sizes: tuple[int, int],
    *,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of hidden and weight, each like its tensor; None for what is not needed.

    dlosses [N], the gradients of the losses; lse [N] from `forward`; otherwise as there.
    """
    operand, dtype = dtypes(hidden, weight)
    counts = targets != options.ignore_index
    dlosses = torch.where(counts, dlosses.to(dtype), 0)
    unit = _unit(dlosses) if operand == torch.float16 else None
    dlosses = dlosses if unit is None else dlosses / unit
    scale = torch.where(counts, dlosses * (1 + 2 * options.z_loss * lse) if options.z_loss else dlosses, 0)
    lse = torch.where(counts, lse, torch.inf)  # exp(0 - inf) = 0
    targets = torch.where(counts, targets, -1)
    token_blocks, vocabulary_blocks = _blocks(hidden, sizes[0]), _blocks(weight, sizes[1])
    by_vocabulary = need_weight and (hidden.shape[0] <= weight.shape[0] or not need_hidden)
    dhidden = _Sum(hidden, token_blocks, dtype, whole=by_vocabulary) if need_hidden else None
    dweight = _Sum(weight, vocabulary_blocks, dtype, whole=not by_vocabulary) if need_weight else None
    tile = _buffer(hidden, token_blocks, vocabulary_blocks, dtype)
    dtile = tile if operand == dtype else torch.empty_like(tile, dtype=operand)
    outer, inner = (vocabulary_blocks, token_blocks) if by_vocabulary else (token_blocks, vocabulary_blocks)
    for one in outer:
        for other in inner:
            (start, stop), (first, last) = (other, one) if by_vocabulary else (one, other)
            mine = slice(start, stop)
            rows, columns = _counting(hidden[mine].to(operand), counts[mine]), weight[first:last].to(operand)
            logits, out = (x[: stop - start, : last - first] for x in (tile, dtile))
            multiply(rows, columns.t(), logits)
            steps.differentiate(
                logits,
                targets[mine],
                first=first,
                softcap=options.softcap,
                lse=lse[mine],
                scale=scale[mine],
                dlosses=dlosses[mine],
                out=out,
            )
            if dhidden is not None:
                dhidden.add((start, stop), out, columns)
            if dweight is not None:
                dweight.add((first, last), out.t(), rows)
        if (complete := dweight if by_vocabulary else dhidden) is not None:
            complete.finish(one, unit)
    for gradient in (dhidden, dweight):
        if gradient is not None:
            gradient.finish_all(unit)
    return None if dhidden is None else dhidden.result, None if dweight is None else dweight.result


def dtypes(hidden: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """In what matrices are multiplied, and in what the products are summed up, which is that of the losses too.

    On a CPU, and under Triton's interpreter there, half precision is multiplied in float32.
    """
    operand = torch.promote_types(hidden.dtype, weight.dtype)
    if operand in HALVES and hidden.device.type == "cpu":
        operand = torch.float32
    return operand, torch.float32 if operand in HALVES else operand


def blocks(count: int, largest: int) -> list[Block]:
    """0 ... count in blocks of at most `largest`, equal as far as multiples of 128 (no kernel likes odd sizes) go."""
    size = -(-count // max(1, -(-count // largest)))
    size = min(largest, -(-size // 128) * 128)
    return [(start, min(start + size, count)) for start in range(0, count, max(1, size))]


def _blocks(x: Tensor, largest: int) -> Sequence[Block]:
    return launching.visited(blocks(x.shape[0], largest), x.device)


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a b, or out + a b with `add`; float32 results of half-precision operands are never rounded to these."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif launching.runs_nothing(a.device):
        pass
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _buffer(x: Tensor, rows: Sequence[Block], columns: Sequence[Block], dtype: torch.dtype) -> Tensor:
    """Room for one tile at a time."""
    height, width = (max((stop - start for start, stop in each), default=0) for each in (rows, columns))
    return x.new_empty((height, -(-width // 16) * 16), dtype=dtype)  # rows that start at whole lines of memory


def _counting(rows: Tensor, counts: Tensor) -> Tensor:
    """Rows [n, D] with 0 where a token is ignored."""
    if rows.device.type == "cpu" and counts.all():  # to ask costs less than a copy
        return rows
    return torch.where(counts[:, None], rows, 0)


def _unit(dlosses: Tensor) -> Tensor:
    """The largest finite gradient: in units of it float16 holds what a mean over many tokens leaves of each."""
    largest = torch.where(dlosses.isfinite(), dlosses.abs(), 0)
    return torch.where(largest.any(), largest.amax(), 1) if largest.numel() else largest.new_ones(())


class _Sum:
    """The gradient of `x` [rows, D], summed up by blocks of rows in `dtype`, `whole` or one block at a time."""

    def __init__(self, x: Tensor, blocks: Sequence[Block], dtype: torch.dtype, *, whole: bool) -> None:
        self.result = torch.empty_like(x, memory_format=torch.contiguous_format)
        self._blocks, self._whole = blocks, whole
        rows = x.shape[0] if whole else max((stop - start for start, stop in blocks), default=0)
        self._sums = self.result if x.dtype == dtype else x.new_empty((rows, x.shape[1]), dtype=dtype)
        self._begun: set[Block] = set()
        self._finished: set[Block] = set()

    def add(self, block: Block, a: Tensor, b: Tensor) -> None:
        """Add the product a b to a block of rows."""
        multiply(a, b, self._of(block), add=block in self._begun)
        self._begun.add(block)

    def finish(self, block: Block, unit: Tensor | None) -> None:
        """Write a block that is complete to the result, times `unit`."""
        self._finished.add(block)
        result, sums = self.result[slice(*block)], self._of(block)
        if block not in self._begun:
            result.zero_()
        elif unit is not None:
            result.copy_(sums.mul_(unit))
        elif self._sums is not self.result:
            result.copy_(sums)

    def finish_all(self, unit: Tensor | None) -> None:
        """Finish the blocks that are not yet."""
        for block in self._blocks:
            if block not in self._finished:
                self.finish(block, unit)

    def _of(self, block: Block) -> Tensor:
        start, stop = block
        return self._sums[start:stop] if self._whole or self._sums is self.result else self._sums[: stop - start]
