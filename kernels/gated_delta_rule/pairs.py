"""How the tokens of a chunk meet each other, on PyTorch: key with key, and query with key.

    A_ij = k_i . (k_j exp(between_ij))  for j < i         P_ij = q_i . (k_j exp(between_ij))  for j <= i, else 0

with `between` as in linear_attention/decays.py. As there, one decay per head is a matrix of factors, and decays per
channel go by halves: in a block whose second half meets its first, exp(between_ij) is rise_i * fall_j, both at most 1.

Shapes: q, k [m, H, C, K], A, P and their gradients [m, H, C, C].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.kernels.linear_attention.decays import LevelGradients, TileDecay, lower, upper
from longtrain.kernels.linear_attention.within_chunk import product, to_width


class PairGradients(NamedTuple):
    """Gradients of q and k [m, H, C, K], and of the decays (see `TileDecay.gradient`)."""

    dq: Tensor
    dk: Tensor
    pairs: Tensor | None = None
    levels: LevelGradients = ()


def key_pairs(k: Tensor, decay: TileDecay) -> Tensor:
    """A."""
    between = decay.between
    if between is None:
        return _by_halves(k, k, decay)
    return product(k, k.transpose(2, 3)).mul_(between).tril_(-1)


def query_pairs(q: Tensor, k: Tensor, decay: TileDecay) -> Tensor:
    """P."""
    between = decay.between
    if between is not None:
        return product(q, k.transpose(2, 3)).mul_(between).tril_()
    p = _by_halves(q, k, decay)
    p.diagonal(dim1=2, dim2=3).copy_((q * k).sum(-1))
    return p


def _by_halves(x: Tensor, k: Tensor, decay: TileDecay) -> Tensor:
    """x_i . (k_j exp(between_ij)) for j < i, else 0."""
    result = x.new_zeros((*x.shape[:3], x.shape[2]))
    for half, rise, fall in decay.halvings.levels:
        block = _blocks(result, half)
        written = (lower(k, half) * fall).transpose(1, 2)
        block.copy_(torch.bmm(upper(x, half) * rise, written).view(block.shape))
    return result


def pairs_backward(
    q: Tensor, k: Tensor, a: Tensor, p: Tensor, da: Tensor, dp: Tensor, decay: TileDecay, *, need_decay_gradient: bool
) -> PairGradients:
    """Gradients of both for those of A and P, of which the parts that are always 0 do not count."""
    between = decay.between
    if between is not None:
        cross = (a * da).addcmul_(p, dp) if need_decay_gradient else None
        da, dp = (da * between).tril_(-1), (dp * between).tril_()
        dk = product(dp.transpose(2, 3), q)
        dk += product(da + da.transpose(2, 3), k)
        return PairGradients(product(dp, k), dk, cross)
    diagonal = dp.diagonal(dim1=2, dim2=3)[..., None]
    dq, dk, levels = diagonal * k, diagonal * q, []
    for half, rise, fall in decay.halvings.levels:
        written = lower(k, half) * fall
        dwritten, drise = torch.zeros_like(written), 0.0
        for x, gradient, dx in ((k, da, dk), (q, dp, dq)):
            block = _blocks(gradient, half).reshape(-1, half, half)
            reader = upper(x, half) * rise
            dreader = torch.bmm(block, written)
            dwritten += torch.bmm(block.transpose(1, 2), reader)
            upper(dx, half).addcmul_(dreader, rise)
            drise = drise + to_width(reader * dreader, rise.shape[-1])
        lower(dk, half).addcmul_(dwritten, fall)
        levels.append((drise, to_width(written * dwritten, fall.shape[-1])))
    return PairGradients(dq, dk, levels=levels)


def _blocks(x: Tensor, half: int) -> Tensor:
    """Where second halves meet first ones in x [m, H, C, C]: a view [m * H, C / (2 * half), half, half]."""
    count = x.shape[3] // (2 * half)
    blocks = x.view(-1, count, 2, half, count, 2, half)[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
