"""Softmax attention query by query: the definition that every other implementation is tested against.

For a query i of head h that sees the keys j in its set J (Vaswani et al. 2017, equation 1, with a mask):

    s_j = scale * q_i . k_j                      (softcap c: s_j = c * tanh(scale * q_i . k_j / c))
    lse_i = log sum_{j in J} exp(s_j)
    o_i = sum_{j in J} exp(s_j - lse_i) v_j      (sink logit z_h: exp(s_j - log(exp(lse_i) + exp(z_h))))

Keys outside J are never touched, so nothing in them can reach the query, not even a NaN, in either direction.
Computed in float64 for float64 inputs, else in float32. Time T x S and slow: for tests and for reading.
"""

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.intervals import KeyIntervals


def seen_by(
    query: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None] | None,
    query_offsets: np.ndarray,
    key_offsets: np.ndarray,
) -> slice:
    """The keys that one query sees, from positions alone: a slice of neighbours, since every limit cuts at the ends."""
    document = max(n for n in range(query_offsets.size - 1) if query_offsets[n] <= query)  # skips empty ones before it
    keys = range(int(key_offsets[document]), int(key_offsets[document + 1]))
    own = query - int(query_offsets[document + 1]) + keys.stop  # the last query stands on the last key
    left, right = window if window is not None else (None, None)
    seen = [
        key
        for key in keys
        if (not causal or key <= own) and (left is None or key >= own - left) and (right is None or key <= own + right)
    ]
    return slice(seen[0], seen[-1] + 1) if seen else slice(0, 0)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: list[slice],
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole operator, differentiated by autograd.

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V], sinks [H] -> out [B, T, H, V], lse [B, T, H], both in float32
    (float64 for float64 inputs). `seen`: for each of the T queries the keys that it sees.
    """
    state = _state_dtype(q, k, v)
    q, k, v = q.to(state), k.to(state), v.to(state)
    outs, lses = [q.new_zeros(q.shape[0], 0, q.shape[2], v.shape[3])], [q.new_zeros(q.shape[0], 0, q.shape[2])]
    for i, keys in enumerate(seen):
        scores = _scores(q[:, i], k[:, keys], scale=scale, softcap=softcap)
        lse = scores.logsumexp(-1)  # [B, H]; -inf over no keys
        total = lse
        if sinks is not None and keys.start < keys.stop:
            sink = sinks.to(state).expand(q.shape[0], -1)[..., None]
            total = torch.cat([scores, sink], dim=-1).logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        outs.append(_weigh(weights, v[:, keys])[:, None])
        lses.append(lse[:, None])
    # Every input is part of the graph, also where there is no query or none that sees a key: then its gradient is 0.
    nothing = sum(x[:0].sum() for x in (q, k, v, sinks) if x is not None)
    return torch.cat(outs, dim=1) + nothing, torch.cat(lses, dim=1) + nothing


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
    """`attention_forward` (see the package) query by query."""
    q, k, v = q.to(out.dtype), k.to(out.dtype), v.to(out.dtype)
    for i, (lo, hi) in enumerate(zip(intervals.lo.tolist(), intervals.hi.tolist(), strict=True)):
        if lo == hi:
            continue
        scores = _scores(q[:, i], k[:, lo:hi], scale=scale, softcap=softcap)
        total = torch.logaddexp(lse[:, i], scores.logsumexp(-1))
        earlier = (lse[:, i] - total).exp()[..., None]  # what the keys of earlier calls weigh; 0 where there were none
        out[:, i] = out[:, i] * earlier + _weigh((scores - total[..., None]).exp(), v[:, lo:hi])
        lse[:, i] = total


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
) -> None:
    """`attention_backward` (see the package) query by query (Dao et al. 2022, appendix B.2):

    with w_j = exp(s_j - lse), delta = dout . out - dlse: ds_j = w_j (dout . v_j - delta), and from it
    dv_j = w_j dout, dq = scale * sum_j ds_j k_j, dk_j = scale * ds_j q; softcap c turns ds_j into ds_j (1 - (s_j/c)^2).
    """
    q, k, v = q.to(dq.dtype), k.to(dq.dtype), v.to(dq.dtype)
    heads, groups = q.shape[2], k.shape[2]
    delta = (dout * out).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    for i, (lo, hi) in enumerate(zip(intervals.lo.tolist(), intervals.hi.tolist(), strict=True)):
        if lo == hi:
            continue
        scores = _scores(q[:, i], k[:, lo:hi], scale=scale, softcap=softcap)
        weights = (scores - lse[:, i, :, None]).exp()
        dweights = torch.einsum("bgrv,bngv->bgrn", dout[:, i].unflatten(1, (groups, heads // groups)), v[:, lo:hi])
        dscores = weights * (dweights.flatten(1, 2) - delta[:, i, :, None])
        if softcap is not None:
            dscores = dscores * (1 - (scores / softcap) ** 2)
        dq[:, i] += scale * _weigh(dscores, k[:, lo:hi])
        dk[:, lo:hi] += scale * _spread(dscores, q[:, i], groups)
        dv[:, lo:hi] += _spread(weights, dout[:, i], groups)


def _state_dtype(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _scores(q: Tensor, k: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """One query's scores: q [B, H, K], k [B, n, G, K] -> [B, H, n]; H/G neighbouring heads share a key head."""
    heads, groups = q.shape[1], k.shape[2]
    scores = scale * torch.einsum("bgrk,bngk->bgrn", q.unflatten(1, (groups, heads // groups)), k).flatten(1, 2)
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def _weigh(weights: Tensor, x: Tensor) -> Tensor:
    """The sum of the keys' vectors: weights [B, H, n], x [B, n, G, V] -> [B, H, V]."""
    groups = x.shape[2]
    weights = weights.unflatten(1, (groups, weights.shape[1] // groups))
    return torch.einsum("bgrn,bngv->bgrv", weights, x).flatten(1, 2)


def _spread(weights: Tensor, x: Tensor, groups: int) -> Tensor:
    """A query's share in each key's gradient: weights [B, H, n], x [B, H, V] -> [B, n, G, V]."""
    share = (groups, weights.shape[1] // groups)
    return torch.einsum("bgrn,bgrv->bngv", weights.unflatten(1, share), x.unflatten(1, share))
