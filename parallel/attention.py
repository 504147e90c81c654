"""Softmax attention over a sequence that is spread over the ranks of a group: ring attention.

Every rank keeps its queries. Keys and values travel around the ring, and after W steps each query has met every key
that it may see (Liu et al. 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context"; Brandon et al.
2023, "Striped Attention: Faster Ring Attention for Causal Transformers", for layouts that balance it). What a rank's
queries see of another rank's keys is one interval of keys per query, whatever the layout, mask and documents
(`SequenceShard.intervals`). So there is one forward and one backward for all of them, and a group of one rank runs the
same code without a message.

Letters: B batch, T_w tokens on this rank, S_w keys on this rank, H query heads, G key/value heads, K query/key width,
V value width, W ranks. The state dtype is float32 (float64 for float64 inputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.softmax_attention import apply_sinks, attention_backward, attention_forward
from longtrain.parallel.agreement import agree, check_shard, check_tokens, shard_signature, tensor_signature
from longtrain.parallel.communication import RingExchange, accumulation_dtype, same_group
from longtrain.parallel.shard import SequenceShard

STRATEGIES = ("auto", "ring")
"""The strategies that run."""

Window = tuple[int | None, int | None] | None


@dataclass(frozen=True, eq=False)
class RingOptions:
    """All that ring attention needs besides its tensors."""

    shard: SequenceShard
    key_shard: SequenceShard
    causal: bool
    window: Window
    scale: float
    softcap: float | None
    backend: str


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    *,
    key_shard: SequenceShard | None = None,
    causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    strategy: str = "auto",
    ulysses_degree: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of this rank's queries to the keys of all ranks; the same numbers as on one device.

    All ranks of the group make the same call, and all of them run its backward pass or none does.

    Args:
        q: ``[B, T_w, H, K]``, this rank's queries in the order of ``shard.positions``; float64, float32, bfloat16 or
            float16. B is 1 where the shard packs several documents.
        k: ``[B, S_w, G, K]``, G a divisor of H, in q's dtype. v: ``[B, S_w, G, V]``. S_w is T_w unless `key_shard`.
        shard: which tokens of the sequence this rank holds.
        key_shard: for cross-attention, the shard of k and v: any length, layout and documents (as many as `shard` has),
            over the same group. Where lengths differ, document n's last query stands on document n's last key.
        causal: a query sees no key after its own position.
        window: ``(left, right)``: query i sees i-left ... i+right; None inside the pair is unlimited.
        scale: multiplies the scores; None means ``K ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        sinks: ``[H]`` logits that join the softmax's denominator. Their gradient is this rank's own part.
        strategy: ``"ring"``, which is also what ``"auto"`` means.
        ulysses_degree: belongs to strategies that are not there yet; must be None.
        backend: which kernels compute a tile, as in ``softmax_attention``.

    Returns:
        out ``[B, T_w, H, V]`` in q's dtype and lse ``[B, T_w, H]`` in the state dtype, the natural log of the softmax's
        denominator without sinks; both differentiable. A query that sees no key gets 0 and -inf, and zero gradients.

    Raises:
        ValueError: what cannot work: at once where this rank can see it alone; on all ranks where they disagree.
    """
    _check_strategy(strategy, ulysses_degree)
    _check_tensors(q, k, v, sinks)
    check_shard(shard, batch=q.shape[0])
    check_tokens("q", q, shard)
    keys = shard if key_shard is None else key_shard
    _check_key_shard(k, shard, keys)
    if not isinstance(causal, bool):
        raise ValueError(f"causal: got {causal!r}, expected True or False")
    factor = checks.number("scale", scale)
    options = RingOptions(
        shard=shard,
        key_shard=keys,
        causal=causal,
        window=checks.attention_window(window),
        scale=q.shape[3] ** -0.5 if factor is None else factor,
        softcap=checks.number("softcap", softcap, positive=True),
        backend=choose_backend("softmax_attention", backend, device=q.device),
    )
    agree(shard, _signature(q, k, v, sinks, options), device=q.device)
    out, lse = _RingAttention.apply(q, k, v, options)
    if sinks is not None:
        out = apply_sinks(out, lse, sinks)
    return out.to(q.dtype), lse


def ring_attention_forward(q: Tensor, k: Tensor, v: Tensor, options: RingOptions) -> tuple[Tensor, Tensor]:
    """One turn of the ring: out ``[B, T_w, H, V]`` and lse ``[B, T_w, H]`` in the state dtype, before sinks.

    In step s this rank works on the keys of rank r - s while the block of the next step is on its way: W - 1 hops of K
    and V in the inputs' dtype. The partial results are merged in place, so memory does not grow with W.
    """
    shard, state = options.shard, accumulation_dtype(q.dtype)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=state, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=state, device=q.device)
    ring = RingExchange(shard.group)
    block: Sequence[Tensor] = [k.contiguous(), v.contiguous()]
    for step in range(shard.world):
        last = step == shard.world - 1
        following = [] if last else _empty_blocks(block, options, step + 1)
        ring.start(send=[] if last else block, receive=following)
        intervals = _intervals(options, step)
        if intervals.area:
            attention_forward(
                q,
                block[0],
                block[1],
                intervals,
                scale=options.scale,
                softcap=options.softcap,
                out=out,
                lse=lse,
                backend=options.backend,
            )
        ring.wait()
        block = following
    return out, lse


def ring_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    options: RingOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ring once more: dq, dk, dv of this rank's q, k, v in the state dtype, for the gradients of out and lse.

    dq stays. K and V make W - 1 hops as in forward. The sums of dK and dV follow their block one step behind, in the
    state dtype, and their W-th hop takes them home. A rank computes its share while the sums of the ranks before it
    arrive, and then adds: every sum is made in the order of the ring, the same in every run.
    """
    shard = options.shard
    dq = torch.zeros(q.shape, dtype=out.dtype, device=q.device)
    ring = RingExchange(shard.group)
    block: Sequence[Tensor] = [k.contiguous(), v.contiguous()]
    sums: Sequence[Tensor] = []  # dK, dV of the block of the step before, from the ranks up to this one
    for step in range(shard.world):
        last = step == shard.world - 1
        following = [] if last else _empty_blocks(block, options, step + 1)
        arriving = _empty_blocks(sums, options, step)
        ring.start(send=[*([] if last else block), *sums], receive=[*following, *arriving])
        intervals = _intervals(options, step)
        share: Sequence[Tensor] = []
        if intervals.area or step == 0:  # the sums of a block start on its own rank, if with zeros
            dk, dv = share = [torch.zeros_like(x, dtype=out.dtype) for x in block]
            attention_backward(
                q,
                block[0],
                block[1],
                intervals,
                out=out,
                lse=lse,
                dout=dout,
                dlse=dlse,
                scale=options.scale,
                softcap=options.softcap,
                dq=dq,
                dk=dk,
                dv=dv,
                backend=options.backend,
            )
        ring.wait()
        if share and arriving:
            for mine, others in zip(share, arriving, strict=True):
                mine += others
        sums, block = share or arriving, following
    home = _empty_blocks(sums, options, 0)
    ring.start(send=sums, receive=home)
    ring.wait()
    dk, dv = home
    return dq, dk, dv


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: RingOptions) -> tuple[Tensor, Tensor]:
        with without_autocast(q.device):
            out, lse = ring_attention_forward(q, k, v, options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, dlse = gradients
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:  # this rank's loss uses lse alone; the other ranks wait for its share all the same
            dout = torch.zeros_like(out)
        with without_autocast(q.device):
            grads = ring_attention_backward(q, k, v, out=out, lse=lse, dout=dout, dlse=dlse, options=ctx.options)
        wanted = zip(grads, (q, k, v), ctx.needs_input_grad[:3], strict=True)
        return *(grad.to(x.dtype) if needed else None for grad, x, needed in wanted), None


def _source(options: RingOptions, step: int) -> int:
    """The rank whose keys this rank works on in a step of the ring; W steps on, it is this rank again."""
    return (options.shard.rank - step) % options.shard.world


def _intervals(options: RingOptions, step: int) -> KeyIntervals:
    keys = None if options.key_shard is options.shard else options.key_shard
    return options.shard.intervals(_source(options, step), key_shard=keys, causal=options.causal, window=options.window)


def _empty_blocks(like: Sequence[Tensor], options: RingOptions, step: int) -> Sequence[Tensor]:
    """Uninitialised tensors as `like`, `[B, S_w, G, width]`, with the S_w of the rank that a step works on."""
    tokens = options.key_shard.lengths[_source(options, step)]
    return [x.new_empty((x.shape[0], tokens, *x.shape[2:])) for x in like]


def _check_strategy(strategy: str, ulysses_degree: int | None) -> None:
    if strategy not in STRATEGIES:
        known = "is not there yet" if strategy in ("allgather", "ulysses", "mesh") else "does not exist"
        raise ValueError(f"strategy: got {strategy!r}, which {known}; what works is 'ring', also as 'auto'")
    if ulysses_degree is not None:
        raise ValueError(
            f"ulysses_degree: got {ulysses_degree!r}, expected None: strategy {strategy!r} runs as a ring, which has "
            "no Ulysses part"
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """What a rank can tell of the tensors without looking at the shards."""
    checks.sizes("q", checks.floating("q", q, "[B, T_w, H, K]"), (None, q.shape[1], None, None), "[B, T_w, H, K]")
    batch, _, heads, key_width = q.shape
    checks.floating("k", k, "[B, S_w, G, K]")
    checks.floating("v", v, "[B, S_w, G, V]")
    checks.sizes("k", k, (batch, k.shape[1], None, key_width), "[B, S_w, G, K]")
    checks.sizes("v", v, (batch, k.shape[1], k.shape[2], None), "[B, S_w, G, V]")
    checks.grouped_heads(heads, k.shape[2], name="k")
    if sinks is not None:
        checks.sizes("sinks", checks.floating("sinks", sinks, "[H]"), (heads,), "[H]")
    checks.same_device(q=q, k=k, v=v, sinks=sinks)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected that of q, {q.dtype}")


def _check_key_shard(k: Tensor, shard: SequenceShard, key_shard: SequenceShard) -> None:
    if not isinstance(key_shard, SequenceShard):
        raise ValueError(f"key_shard: got {type(key_shard).__name__}, expected a SequenceShard or None")
    if not same_group(shard.group, key_shard.group) or (shard.rank, shard.world) != (key_shard.rank, key_shard.world):
        raise ValueError(f"key_shard: got {key_shard}, expected a shard over the same group as {shard}")
    if key_shard.documents != shard.documents:
        raise ValueError(
            f"key_shard: got {key_shard.documents} documents, expected {shard.documents} as in shard: document n of "
            "the queries sees document n of the keys"
        )
    check_tokens("k", k, key_shard, name="shard" if key_shard is shard else "key_shard")


def _signature(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: RingOptions) -> dict[str, object]:
    """What the ranks must agree on before the first message."""
    return {
        "operator": "sequence_parallel_attention",
        "q": tensor_signature(q),
        "k": tensor_signature(k),
        "v": tensor_signature(v),
        "sinks": "None" if sinks is None else "given",
        "shard": shard_signature(options.shard),
        "key_shard": "shard" if options.key_shard is options.shard else shard_signature(options.key_shard),
        "causal": options.causal,
        "window": options.window,
        "scale": options.scale,
        "softcap": options.softcap,
        "backend": options.backend,
        "requires_grad": torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
    }
