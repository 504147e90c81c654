"""Attention inside chunks, forward and backward, in two forms that give the same numbers.

    o_i = sum_{j <= i} (q_i . k_j exp(between_ij)) v_j       (the decay stands inside the product if it is per channel)

*The matrix form*, for one decay per head: all scores of a chunk in one product, times exp(between), which is 0 where
j > i. Fastest, but 0 * NaN is NaN there, so a NaN or inf also reaches tokens before it. It is tried first where a look
at the result costs little (on a CPU), and what comes out with a NaN or inf is computed again by

*the halving form*: the chunk's two halves, with the second reading the first; then each half likewise, down to single
tokens (`Halvings`). No masks, no exponents above 0, decays per channel, and a NaN stays with those who see it.

Shapes: q, k [m, G, C, K] or [m, H, C, K], alike, q with the scale in it; v [m, H, C, V].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.kernels.linear_attention.decays import Halvings, LevelGradients, TileDecay, lower, upper


class Gradients(NamedTuple):
    """Gradients from inside the chunks: of q and k per head, of v, and of the decays (see `TileDecay.gradient`)."""

    dq: Tensor  # [m, G or H, C, K]
    dk: Tensor
    dv: Tensor
    pairs: Tensor | None = None
    levels: LevelGradients = ()


def per_head(x: Tensor, heads: int) -> Tensor:
    """x [m, G, C, K] as [m, H, C, K]: each of G heads repeated for those that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, decay: TileDecay) -> Tensor:
    """Outputs [m, H, C, V] of the chunks' tokens from their own chunks."""
    if decay.between is not None:
        out = _attend_matrix(q, k, v, decay.between)
        if _finite(out):
            return out
    return _attend_halving(per_head(q, v.shape[1]), per_head(k, v.shape[1]), v, decay.halvings)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, decay: TileDecay, *, need_decay_gradient: bool
) -> Gradients:
    """Gradients of `attend` for dout [m, H, C, V]."""
    if decay.between is not None:
        gradients = _attend_matrix_backward(q, k, v, dout, decay.between, need_decay_gradient=need_decay_gradient)
        # Both see dout, and between them q, k, v and whatever overflows in a product.
        if _finite(gradients.dk, gradients.dv):
            return gradients
    q, k = per_head(q, v.shape[1]), per_head(k, v.shape[1])
    return _attend_halving_backward(q, k, v, dout, decay.halvings, need_decay_gradient=need_decay_gradient)


def _finite(*results: Tensor) -> bool:
    """Whether all numbers are finite, as their sum tells (where that overflows, in vain): one cheap pass on a CPU."""
    return all(math.isfinite(x.sum().item()) for x in results)


def _attend_matrix(q: Tensor, k: Tensor, v: Tensor, between: Tensor) -> Tensor:
    return product(_weigh(product(q, k.transpose(2, 3)), between, v.shape[1]), v)


def _attend_matrix_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, between: Tensor, *, need_decay_gradient: bool
) -> Gradients:
    heads, groups = v.shape[1], q.shape[1]
    dscores = product(dout, v.transpose(2, 3)).mul_(between)  # [m, H, C, C]
    scores = product(q, k.transpose(2, 3))  # [m, G, C, C]
    pairs = per_head(scores, heads) * dscores if need_decay_gradient else None
    dv = product(_weigh(scores, between, heads).transpose(2, 3), dout)
    if groups != heads:
        dscores = dscores.unflatten(1, (groups, -1)).sum(2)
    return Gradients(product(dscores, k), product(dscores.transpose(2, 3), q), dv, pairs)


def _weigh(scores: Tensor, between: Tensor, heads: int) -> Tensor:
    """scores [m, G, C, C] * between [m or 1, H or 1, C, C] -> [m, H, C, C]; in place where heads are not shared."""
    if scores.shape[1] == heads:
        return scores.mul_(between)
    between = between.expand(-1, heads, -1, -1).unflatten(1, (scores.shape[1], -1))
    return (scores[:, :, None] * between).flatten(1, 2)


def _attend_halving(q: Tensor, k: Tensor, v: Tensor, halvings: Halvings) -> Tensor:
    out = (q * k).sum(-1, keepdim=True) * v
    for half, rise, fall in halvings.levels:
        scores = dot(upper(q, half) * rise, lower(k, half) * fall)
        upper(out, half).add_(mix(scores, lower(v, half)))
    return out


def _attend_halving_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, halvings: Halvings, *, need_decay_gradient: bool
) -> Gradients:
    score, dscore = (q * k).sum(-1, keepdim=True), (dout * v).sum(-1, keepdim=True)
    dq, dk, dv = dscore * k, dscore * q, score * dout
    levels = []
    for half, rise, fall in halvings.levels:
        reader, written = upper(q, half) * rise, lower(k, half) * fall
        scores, dscores = dot(reader, written), dot(upper(dout, half), lower(v, half))
        lower(dv, half).add_(mix(scores.transpose(1, 2), upper(dout, half)))
        dreader, dwritten = mix(dscores, written), mix(dscores.transpose(1, 2), reader)
        upper(dq, half).addcmul_(dreader, rise)
        lower(dk, half).addcmul_(dwritten, fall)
        if need_decay_gradient:
            levels.append((to_width(reader * dreader, rise.shape[-1]), to_width(written * dwritten, rise.shape[-1])))
    return Gradients(dq, dk, dv, levels=levels)


def to_width(x: Tensor, width: int) -> Tensor:
    """x [..., K] as it is, or summed over K for decays of width 1."""
    return x if x.shape[-1] == width else x.sum(-1, keepdim=True)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [m, H, ., .]."""
    m, heads, rows, _ = a.shape
    return torch.bmm(flat(a), flat(b)).view(m, heads, rows, b.shape[3])


def flat(x: Tensor) -> Tensor:
    """[m, H, ., .] as [m * H, ., .]: a view, also of a transposed tensor."""
    return x.view(-1, x.shape[2], x.shape[3])


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: [blocks, half, K] -> [blocks, half, half]."""
    if a.shape[1] <= 2:  # batched products of such tiny matrices are slower than their elements one by one
        return (a[:, :, None] * b[:, None]).sum(-1)
    return torch.bmm(a, b.transpose(1, 2))


def mix(weights: Tensor, x: Tensor) -> Tensor:
    """weights x: [blocks, half, half], [blocks, half, K] -> [blocks, half, K]."""
    if x.shape[1] <= 2:
        return (weights[..., None] * x[:, None]).sum(2)
    return torch.bmm(weights, x)
