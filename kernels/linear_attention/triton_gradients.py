"""The backward pass of `triton_impl.py` behind its states: the sweeps for dq, dk, dv, and the decays' gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.kernels.launching import Config, launch
from longtrain.kernels.linear_attention import configs, triton_backward, triton_channels
from longtrain.kernels.linear_attention.triton_pass import CHANNEL, Pass, blocks_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Read(NamedTuple):
    """What follows from the states alone, without any gradient of one."""

    states: Tensor | None  # S before each part, [B, P, H, K, V]; None: zeros
    leaving: Tensor | None  # and behind each part, if the decays' gradient needs it
    dq: Tensor  # for each head; with decays per channel that of q with its decay in it, without what is within chunks
    products: tuple[Tensor, Tensor] | None  # r and x, each [blocks, B, T, H], where `scalar_gradients` needs them


def read(this: Pass, states: Tensor | None, *, need_decay_gradient: bool) -> Read:
    """The sweep for dq; states [B, P, H, K, V]: S before each part (None: zeros)."""
    assert this.do is not None
    need = need_decay_gradient and this.log is not None
    leaving = this.empty_part_states() if need else None
    way = {"forward": True, "transposed": True, "entering": states, "leaving": leaving}
    if this.form == CHANNEL:
        dq = this.empty(this.key_width, dtype=torch.float32)
        this.sweep(this.do, this.v, this.as_rows(this.prepared[1]), dq, **way)
        return Read(states, leaving, dq, None)
    dq = _per_head(this, this.q.tensor)
    products = this.sweep(this.do, this.v, this.k, dq, **way, other=this.q if need else None)
    return Read(states, leaving, dq, products)


def scalar_gradients(
    this: Pass, found: Read, dstates: Tensor | None, dentering: Tensor | None, *, need_decay_gradient: bool
) -> Gradients:
    """dq, dk, dv, dlog_decay for at most one decay per head.

    dstates [B, P, H, K, V]: D behind each part (None: zeros); dentering: D before, to be written.
    """
    assert this.do is not None
    need = need_decay_gradient and this.log is not None
    states, leaving, dq, read_products = found
    dk = _per_head(this, this.k.tensor)
    dv = this.empty(this.value_width, dtype=this.v.tensor.dtype)
    written = _keys_values(this, dk, dv, dstates, dentering, need=need)
    dlog = None
    if read_products is not None and written is not None:
        (r, x), (w, y) = ([product.sum(0) for product in products] for products in (read_products, written))
        dlog = torch.empty_like(r)
        launch(
            triton_backward.decay_gradient,
            (this.batch * this.heads * this.plan.count,),
            *(r, w, x, y, states, leaving, dstates, dentering, dlog),
            *(this.plan.on_device, this.heads, this.tokens, this.plan.count),
            config=configs.decay_gradient(*this.key),
            K=this.key_width,
            V=this.value_width,
            C=this.size,
        )
    return _shared(dq, this.q.tensor), _shared(dk, this.k.tensor), dv, None if dlog is None else _own(this, dlog)


def channel_gradients(
    this: Pass, found: Read, dstates: Tensor | None, dentering: Tensor | None, *, need_decay_gradient: bool
) -> Gradients:
    """`scalar_gradients` for decays per channel."""
    assert this.do is not None
    readers, written, scores, _ = this.prepared
    reading, writing = this.as_rows(readers), this.as_rows(written)
    states, leaving, dreaders, _ = found
    dwritten = torch.empty_like(dreaders)
    dv = this.empty(this.value_width, dtype=this.v.tensor.dtype)
    this.sweep(this.v, this.do, reading, dwritten, forward=False, transposed=True, entering=dstates)
    this.sweep(
        *(writing, reading, this.do, dv),
        forward=False,
        transposed=False,
        entering=dstates,
        leaving=dentering,
        scores=scores,
        plain=(this.k, this.q),
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
            *(readers, dreaders, written, dwritten, states, leaving, dstates, dentering, ends, this.plan.on_device),
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
    this: Pass, dk: Tensor, dv: Tensor, dstates: Tensor | None, dentering: Tensor | None, *, need: bool
) -> tuple[Tensor, Tensor] | None:
    """Fills dk, dv and dentering; returns w and y, each [blocks, B, T, H], if needed."""
    assert this.do is not None
    config = configs.keys_values(*this.key)
    block_k, block_v = (min(config.constants["BO"], x) for x in (this.block_k, this.block_v))
    key_blocks, value_blocks = blocks_of(this.key_width, block_k), blocks_of(this.value_width, block_v)
    parts = this.batch * this.heads * this.plan.count
    written = this.empty_products(key_blocks) if need else None
    flags = [None if this.by_tokens else this.empty_flags(parts * blocks) for blocks in (key_blocks, value_blocks)]
    if not this.by_tokens:
        launch(
            triton_backward.sweep_keys_values,
            (parts * (key_blocks + value_blocks),),
            *(this.q.tensor, this.k.tensor, this.v.tensor, this.do.tensor, dk, dv, this.log, dstates, dentering),
            *(this.plan.on_device, *(written or (None, None)), *flags),
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
    way = {"forward": False, "entering": dstates}
    this.sweep_tokens(
        *(this.v, this.do, this.q, dk),
        **way,
        transposed=True,
        leaving=None,
        block=block_k,
        products=written,
        other=this.k if need else None,
        flags=flags[0],
    )
    this.sweep_tokens(
        *(this.k, this.q, this.do, dv),
        **way,
        transposed=False,
        leaving=dentering,
        block=block_v,
        products=None,
        other=None,
        flags=flags[1],
    )
    return written


def _per_head(this: Pass, x: Tensor) -> Tensor:
    """Where x's gradient goes, [B, T, H, K]: float32 where heads that share one of x's are to be summed."""
    return this.empty(this.key_width, dtype=x.dtype if x.shape[2] == this.heads else torch.float32)


def _shared(gradient: Tensor, x: Tensor) -> Tensor:
    if gradient.shape[2] == x.shape[2]:
        return gradient
    return gradient.unflatten(2, (x.shape[2], -1)).sum(3).to(x.dtype)


def _own(this: Pass, dlog: Tensor) -> Tensor:
    """The gradient of each token's log-decays, float32, as that of log_decay."""
    log_decay = this.log_decay
    assert log_decay is not None
    if log_decay.ndim == 1:
        dlog = dlog.sum((0, 1), dtype=torch.float64)
    return dlog.to(log_decay.dtype)
