"""Softmax attention as PyTorch calls on tiles of visible (query, key) pairs, with memory linear in T.

On a CPU, without softcap, a tile is one call of the flash kernel that PyTorch has for CPUs; elsewhere it is a few
matrix products. A tile's result is merged into the running (out, lse), and its backward needs nothing but the final
ones (Dao et al. 2022, "FlashAttention"; Milakov & Gimelshein 2018 for the merge).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals, Tile
from longtrain.kernels.softmax_attention.containment import all_finite, contain, keys_seen_by

_native_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_native_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Largest tile of matrix products: its scores are B * H * 256 * 512 numbers, whatever T.
_ROWS, _KEYS = 256, 512

# Tiles of the native backward are not cut below this many queries.
_SHORTEST_CUT = 256


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    """`attention_forward` (see the package) by tiles."""
    if intervals.area == 0 or out.numel() == 0:
        return
    q, k, v = q.to(out.dtype), k.to(out.dtype), v.to(out.dtype)
    bad = None
    if not all_finite(q, k, v):
        (q,), (k, v), bad = contain(intervals, queries=[q], keys=[k, v])
    if _is_native(q, softcap):
        _forward_native(q, k, v, intervals, scale=scale, out=out, lse=lse)
    else:
        _forward_products(q, k, v, intervals, scale=scale, softcap=softcap, out=out, lse=lse)
    if bad is not None:
        out.masked_fill_(bad[..., None], torch.nan)
        lse.masked_fill_(bad, torch.nan)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    softcap: float | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    frugal: bool,
) -> None:
    """`attention_backward` (see the package) by tiles."""
    if intervals.area == 0 or dq.numel() == 0:
        return
    q, k, v = q.to(dq.dtype), k.to(dq.dtype), v.to(dq.dtype)
    # The lse of a query that sees nothing anywhere is no offender: with 0 it does not set off the containment below.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    bad = None
    if not all_finite(q, k, v, out, lse, dout, dlse):
        suspects = [q, out, lse, dout] + ([] if dlse is None else [dlse])
        suspects, (k, v), bad = contain(intervals, queries=suspects, keys=[k, v])
        q, out, lse, dout, *rest = suspects
        dlse = rest[0] if rest else None
    if _is_native(q, softcap):
        given = {"out": out, "lse": lse, "dout": dout, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
        _backward_native(q, k, v, intervals, **given, scale=scale, frugal=frugal)
    else:
        delta = (dout * out).sum(-1)
        delta = delta if dlse is None else delta - dlse
        _backward_products(
            q, k, v, intervals, lse=lse, dout=dout, delta=delta, scale=scale, softcap=softcap, dq=dq, dk=dk, dv=dv
        )
    if bad is not None:
        keys = keys_seen_by(bad, intervals, k.shape[2])[..., None]
        dq.masked_fill_(bad[..., None], torch.nan)
        dk.masked_fill_(keys, torch.nan)
        dv.masked_fill_(keys, torch.nan)


def _is_native(q: Tensor, softcap: float | None) -> bool:
    return q.device.type == "cpu" and softcap is None


def _merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Merge a tile's softmax [..., V] and its log-sum-exp [...] into the running ones, in place."""
    # The tile's share of the joint sum; where it saw no key, also with nothing before it (-inf - -inf is NaN), none.
    share = torch.sigmoid(tile_lse - lse).masked_fill_(tile_lse == -torch.inf, 0)
    out.lerp_(tile_out, share[..., None])
    lse.copy_(torch.logaddexp(lse, tile_lse))


def _forward_native(
    q: Tensor, k: Tensor, v: Tensor, intervals: KeyIntervals, *, scale: float, out: Tensor, lse: Tensor
) -> None:
    # q takes the scale: the kernel rounds scale * score in forward, but in backward fuses it into the exponent,
    # scale * score - lse, and with an lse of some hundreds that difference costs a digit.
    width, value_width, groups = max(q.shape[3], v.shape[3]), v.shape[3], k.shape[2]
    q, k, v = (_padded(x, width) for x in (q * scale, k, v))
    calls = _calls([q, out, lse], [k, v], groups)
    for tile in intervals.tiles:
        mask, unseeing = _additive_mask(intervals, tile, q)
        for (q_call, out_call, lse_call), (k_call, v_call) in calls:
            tile_out, tile_lse = _native_forward(
                q_call[:, :, tile.rows],
                k_call[:, :, tile.keys].expand(-1, q_call.shape[1], -1, -1),
                v_call[:, :, tile.keys].expand(-1, q_call.shape[1], -1, -1),
                is_causal=tile.kind == "diagonal",
                attn_mask=mask,
                scale=1.0,
            )
            if unseeing is not None:
                tile_lse.masked_fill_(unseeing, -torch.inf)  # the kernel says 0 where a query sees no key
            _merge(out_call[:, :, tile.rows], lse_call[:, :, tile.rows], tile_out[..., :value_width], tile_lse)


def _backward_native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    frugal: bool,
) -> None:
    width, value_width, groups = q.shape[3], v.shape[3], k.shape[2]
    if dlse is not None:
        out, dout = _with_lse_gradient(out, dout, dlse)
    padded = max(width, out.shape[3])
    q, k, v, out, dout = (_padded(x, padded) for x in (q * scale, k, v, out, dout))
    calls = _calls([q, out, lse, dout, dq], [k, v, dk, dv], groups)
    for tile in _cut(intervals, 8 if frugal else 2):
        rows, keys = tile.rows, tile.keys
        mask, _ = _additive_mask(intervals, tile, q)
        for (q_call, out_call, lse_call, dout_call, dq_call), (k_call, v_call, dk_call, dv_call) in calls:
            tile_dq, tile_dk, tile_dv = _native_backward(
                dout_call[:, :, rows],
                q_call[:, :, rows],
                k_call[:, :, keys].expand(-1, q_call.shape[1], -1, -1),
                v_call[:, :, keys].expand(-1, q_call.shape[1], -1, -1),
                out_call[:, :, rows],
                lse_call[:, :, rows],
                0.0,
                tile.kind == "diagonal",
                attn_mask=mask,
                scale=1.0,
            )
            dq_call[:, :, rows].add_(tile_dq[..., :width], alpha=scale)
            # Heads that share a key head each bring their part of its gradient.
            dk_call[:, :, keys].add_(_summed(tile_dk[..., :width], dk_call))
            dv_call[:, :, keys].add_(_summed(tile_dv[..., :value_width], dv_call))
            del tile_dq, tile_dk, tile_dv  # not during the next call, which makes its own


def _with_lse_gradient(out: Tensor, dout: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """An out and a dout that make the kernel take dlse into account.

    The kernel uses out for nothing but delta = rowsum(dout * out), and wanted is delta - dlse. So out gets one number
    in each row, at the largest of dout, that makes it so. Where a row's dout is too small for that (a loss of lse
    alone), all get one more column, of 1 in dout, -dlse in out and 0 in v. That is second best: the kernel then sums
    the scores of a wider q and k, in another order than in forward, and with an lse of some hundreds that costs a
    digit.
    """
    place = dout.abs().argmax(-1, keepdim=True)
    largest, change = dout.gather(-1, place), dlse[..., None]
    if (largest.abs() < torch.finfo(dout.dtype).eps * change.abs()).any():
        return torch.cat([out, -change], dim=-1), torch.cat([dout, torch.ones_like(change)], dim=-1)
    delta = (dout * out).sum(-1, keepdim=True)
    number = (delta - change) / largest.masked_fill(largest == 0, 1)  # both are zero there
    return torch.zeros_like(out).scatter_(-1, place, number), dout


def _padded(x: Tensor, width: int) -> Tensor:
    """x [B, T, H, K] with zeros behind K up to `width`, and that dimension dense in memory.

    The native kernel wants K = V, and takes the last stride for 1: another gives wrong numbers there, not an error.
    """
    if x.shape[-1] == width and x.stride(-1) == 1:
        return x
    padded = x.new_zeros((*x.shape[:-1], width))  # (functional.pad and cat may choose another order in memory)
    padded[..., : x.shape[-1]] = x
    return padded


def _calls(
    queries: Sequence[Tensor], keys: Sequence[Tensor], groups: int
) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Views [rows, heads, T, ...] of queries' [B, T, H, ...] and keys' [B, S, G, ...] tensors, for each native call.

    Where each query head has its own key head (or all have the same), one call takes the whole batch; otherwise each
    batch row is a call, with [G, H/G, T, ...] against [G, 1, S, ...]. Nothing is copied.
    """
    share = queries[0].shape[2] // groups

    def views(x: Tensor) -> list[Tensor]:  # x [B, T, G, H/G or 1, ...]
        if share == 1:
            return [x[:, :, :, 0].transpose(1, 2)]
        if groups == 1:
            return [x[:, :, 0].transpose(1, 2)]
        return [row.movedim(0, 2) for row in x]

    by_query = zip(*(views(x.unflatten(2, (groups, share))) for x in queries), strict=True)
    by_key = zip(*(views(x.unsqueeze(3)) for x in keys), strict=True)
    return list(zip(by_query, by_key, strict=True))


def _summed(x: Tensor, target: Tensor) -> Tensor:
    """Sum [rows, heads, S, K] over heads where `target` has one row for all of them."""
    return x if x.shape[1] == target.shape[1] else x.sum(1, keepdim=True)


def _additive_mask(intervals: KeyIntervals, tile: Tile, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """For a masked tile what to add to its scores [queries, keys], and the queries [queries] with no key, if any."""
    if tile.kind != "masked":
        return None, None
    hidden = torch.from_numpy(~intervals.visible(tile))
    unseeing = hidden.all(1)
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf), unseeing if unseeing.any() else None


def _forward_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    scale: float,
    softcap: float | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    q, out, lse = (x.unflatten(2, (k.shape[2], -1)) for x in (q, out, lse))
    for tile in _small_tiles(intervals):
        rows, keys = tile.rows, tile.keys
        scores = _scores(q[:, rows], k[:, keys], scale=scale, softcap=softcap)
        if (hidden := _hidden(intervals, tile, q)) is not None:
            scores.masked_fill_(hidden, -torch.inf)
        largest = scores.amax(-1, keepdim=True)
        largest.masked_fill_(largest == -torch.inf, 0)  # no key seen: exp(-inf - 0) is 0, exp(-inf - -inf) NaN
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        tile_lse = (total.log() + largest).squeeze(-1)
        weights /= total.masked_fill_(total == 0, 1)
        tile_out = torch.einsum("bgrts,bsgv->btgrv", weights, v[:, keys])
        _merge(out[:, rows], lse[:, rows], tile_out, tile_lse.movedim(3, 1))


def _backward_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: KeyIntervals,
    *,
    lse: Tensor,
    dout: Tensor,
    delta: Tensor,
    scale: float,
    softcap: float | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    q, dout, dq, lse, delta = (x.unflatten(2, (k.shape[2], -1)) for x in (q, dout, dq, lse, delta))
    lse, delta = (x.movedim(1, 3)[..., None] for x in (lse, delta))  # [B, G, H/G, T, 1], as the scores
    for tile in _small_tiles(intervals):
        rows, keys = tile.rows, tile.keys
        scores = _scores(q[:, rows], k[:, keys], scale=scale, softcap=softcap)
        weights = (scores - lse[:, :, :, rows]).exp_()
        if (hidden := _hidden(intervals, tile, q)) is not None:
            weights.masked_fill_(hidden, 0)
        dscores = torch.einsum("btgrv,bsgv->bgrts", dout[:, rows], v[:, keys]).sub_(delta[:, :, :, rows]).mul_(weights)
        if softcap is not None:
            dscores *= 1 - (scores / softcap).square_()  # the derivative of tanh
        dq[:, rows].add_(torch.einsum("bgrts,bsgk->btgrk", dscores, k[:, keys]), alpha=scale)
        dk[:, keys].add_(torch.einsum("bgrts,btgrk->bsgk", dscores, q[:, rows]), alpha=scale)
        dv[:, keys].add_(torch.einsum("bgrts,btgrv->bsgv", weights, dout[:, rows]))


def _cut(intervals: KeyIntervals, parts: int) -> Iterator[Tile]:
    """Tiles of at most that part of the queries: a call's results are as large as its tile, for every head."""
    most = max(_SHORTEST_CUT, -(-intervals.lo.size // parts))
    for tile in intervals.tiles:
        yield from tile.cut(most, most)


def _small_tiles(intervals: KeyIntervals) -> Iterator[Tile]:
    for tile in intervals.tiles:
        yield from tile.cut(_ROWS, _KEYS)


def _scores(q: Tensor, k: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """q [B, t, G, H/G, K], k [B, s, G, K] -> [B, G, H/G, t, s]."""
    scores = torch.einsum("btgrk,bsgk->bgrts", q, k).mul_(scale)
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _hidden(intervals: KeyIntervals, tile: Tile, like: Tensor) -> Tensor | None:
    """The tile's invisible pairs, bool [queries, keys]; None where there are none."""
    return None if tile.kind == "full" else torch.from_numpy(~intervals.visible(tile)).to(like.device)
