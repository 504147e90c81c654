"""The backward pass of `triton_impl.py` behind its states: the sweeps for dq, dk, dv, and the decays' gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longtrain.kernels.launching import Config, launch
from longtrain.kernels.linear_attention import configs, triton_backward, triton_channels

if TYPE_CHECKING:
    from longtrain.kernels.linear_attention.triton_impl import _Pass

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def scalar_gradients(
    this: _Pass, states: Tensor | None, dstates: Tensor | None, dentering: Tensor | None, *, need_decay_gradient: bool
) -> Gradients:
    """dq, dk, dv, dlog_decay for at most one decay per head.

    states, dstates [B, P, H, K, V]: S before and D behind each part (None: zeros); dentering: D before, to be written.
    """
    assert this.do is not None
    need = need_decay_gradient and this.log is not None
    dq, dk = _per_head(this, this.q.tensor), _per_head(this, this.k.tensor)
    dv = this._empty(this.value_width, dtype=this.v.tensor.dtype)
    read = this.sweep(
        this.do, this.v, this.k, dq, forward=True, transposed=True, entering=states, other=this.q if need else None
    )
    written = _keys_values(this, dk, dv, dstates, dentering, need=need)
    within = _pairs(this) if need else None
    dlog = None
    if read is not None and written is not None and within is not None:
        dlog = torch.empty_like(within)
        launch(
            triton_backward.decay_gradient,
            (this.batch * this.heads * this.plan.count,),
            *(read, written, within, states, dentering, dlog, this.plan.on_device),
            *(this.heads, this.tokens, this.plan.count, within.numel(), len(read), len(written)),
            config=configs.small(*this.key),
            K=this.key_width,
            V=this.value_width,
            C=this.size,
        )
    return _shared(dq, this.q.tensor), _shared(dk, this.k.tensor), dv, None if dlog is None else _own(this, dlog)


def channel_gradients(
    this: _Pass, states: Tensor | None, dstates: Tensor | None, dentering: Tensor | None, *, need_decay_gradient: bool
) -> Gradients:
    """`scalar_gradients` for decays per channel."""
    assert this.do is not None
    readers, written, scores, _ = this.prepared
    reading, writing = this._rows(readers), this._rows(written)
    dreaders, dwritten = (this._empty(this.key_width, dtype=torch.float32) for _ in range(2))
    dv = this._empty(this.value_width, dtype=this.v.tensor.dtype)
    this.sweep(this.do, this.v, writing, dreaders, forward=True, transposed=True, entering=states)
    this.sweep(this.v, this.do, reading, dwritten, forward=False, transposed=True, entering=dstates)
    this.sweep(
        *(writing, reading, this.do, dv),
        forward=False,
        transposed=False,
        entering=dstates,
        leaving=dentering,
        scores=scores,
    )
    dq, dk = _per_head(this, this.q.tensor), _per_head(this, this.k.tensor)
    dlog = ends = None
    config = configs.channels(*this.key)
    block = min(config.constants["BK"], this.block_k)
    if need_decay_gradient:
        dlog, ends = torch.empty_like(dreaders), torch.empty_like(this.prepared[3])
        small = configs.small(*this.key)
        launch(
            triton_channels.chunk_ends,
            (this.batch * this.heads * this.plan.count * -(-this.key_width // small.constants["BK"]),),
            *(readers, dreaders, written, dwritten, states, dentering, ends, this.plan.on_device),
            *(this.heads, this.tokens, this.plan.count, this.plan.chunks),
            config=small,
            K=this.key_width,
            V=this.value_width,
            C=this.size,
        )
    launch(
        triton_channels.gradients_within,
        (this.batch * this.heads * this.plan.chunks,),
        *(this.q.tensor, this.k.tensor, this.v.tensor, this.do.tensor, this.log),
        *(dreaders, dwritten, ends, dq, dk, dlog, this.plan.chunk_table),
        *(*this.q.strides, *this.k.strides, *this.v.strides, *this.do.strides, this.q.share, this.k.share),
        *(this.heads, this.tokens, this.plan.chunks, this.scale),
        config=config,
        BK=block,
        K=this.key_width,
        V=this.value_width,
        LEVELS=this.size.bit_length() - 1,
        **{name: this.constants[name] for name in ("TYPE", "PRECISION", "C")},
    )
    return _shared(dq, this.q.tensor), _shared(dk, this.k.tensor), dv, None if dlog is None else _own(this, dlog)


def _keys_values(
    this: _Pass, dk: Tensor, dv: Tensor, dstates: Tensor | None, dentering: Tensor | None, *, need: bool
) -> Tensor | None:
    """Fills dk, dv and dentering; returns w, [blocks, B, T, H], if needed."""
    assert this.do is not None
    config = configs.keys_values(*this.key)
    block_k, block_v = (min(config.constants["BO"], x) for x in (this.block_k, this.block_v))
    key_blocks, value_blocks = -(-this.key_width // block_k), -(-this.value_width // block_v)
    written = None
    if need:
        written = dv.new_empty((key_blocks, this.batch, this.tokens, this.heads), dtype=torch.float32)
    launch(
        triton_backward.sweep_keys_values,
        (this.batch * this.heads * this.plan.count * (key_blocks + value_blocks),),
        *(this.q.tensor, this.k.tensor, this.v.tensor, this.do.tensor, dk, dv, this.log, dstates, dentering),
        *(this.plan.on_device, written),
        *(*this.q.strides, *this.k.strides, *this.v.strides, *this.do.strides, this.q.share, this.k.share),
        *(this.heads, this.batch, this.tokens, this.plan.count, this.scale),
        config=Config({}, config.num_warps, config.num_stages),
        K=this.key_width,
        V=this.value_width,
        BK=this.block_k,
        BV=this.block_v,
        BOK=block_k,
        BOV=block_v,
        **this.constants,
        **this.wide,
    )
    return written


def _pairs(this: _Pass) -> Tensor:
    """The sums of p around each token, [B, T, H]."""
    assert this.do is not None
    within = this.v.tensor.new_empty((this.batch, this.tokens, this.heads), dtype=torch.float32)
    launch(
        triton_backward.pairs_within,
        (this.batch * this.heads * this.plan.chunks,),
        *(this.q.tensor, this.k.tensor, this.v.tensor, this.do.tensor, this.log, within, this.plan.chunk_table),
        *(*this.q.strides, *this.k.strides, *this.v.strides, *this.do.strides, this.q.share, this.k.share),
        *(this.heads, this.tokens, this.plan.chunks, this.scale),
        config=configs.channels(*this.key),
        BK=min(32, this.block_k, this.block_v),
        K=this.key_width,
        V=this.value_width,
        **this.constants,
        **this.wide,
    )
    return within


def _per_head(this: _Pass, x: Tensor) -> Tensor:
    """Where x's gradient goes, [B, T, H, K]: float32 where heads that share one of x's are to be summed."""
    return this._empty(this.key_width, dtype=x.dtype if x.shape[2] == this.heads else torch.float32)


def _shared(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)


def _own(this: _Pass, dlog: Tensor) -> Tensor:
    """The gradient of each token's log-decays, float32, as that of log_decay."""
    log_decay = this.log_decay
    assert log_decay is not None
    if log_decay.ndim == 1:
        dlog = dlog.sum((0, 1), dtype=torch.float64)
    return dlog.to(log_decay.dtype)
