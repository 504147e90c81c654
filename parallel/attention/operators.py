"""The registered operators `longtrain::sequence_parallel_attention` and `..._backward`.

As registered operators the two are single steps to selective checkpointing (a policy that keeps the forward operator's
results repeats none of its messages in backward), to torch.compile and to fake tensors. They take tensors, numbers and
strings: shards go in by handle, as integers that torch.compile may treat as dynamic, so that new documents in every
batch compile nothing anew. Their bodies do the handshake, then all allocations and messages.
"""

from typing import Any

import torch
from torch import Tensor

from longtrain.parallel.agreement import agree, check_shard, check_tokens, tensor_signature
from longtrain.parallel.attention import ring
from longtrain.parallel.attention.call import AttentionCall
from longtrain.parallel.attention.choice import check_strategy, choose
from longtrain.parallel.attention.cost import Heads
from longtrain.parallel.attention.strategies import attention_backward_over_ranks, attention_forward_over_ranks
from longtrain.parallel.communication import accumulation_dtype, same_group
from longtrain.parallel.heads import HeadExchange
from longtrain.parallel.shard import SequenceShard, shard_of

NAME = "longtrain::sequence_parallel_attention"
_OPTIONS = (
    "SymInt shard, SymInt key_shard, bool causal, int? left, int? right, float scale, float? softcap, str strategy, "
    "int? ulysses_degree, int? heads_at_once, str backend"
)
_NAMES = [option.split()[1] for option in _OPTIONS.split(", ")]


@torch.library.custom_op(
    NAME,
    mutates_args=(),
    # wide: out in the state dtype. gradients: backward will follow. keep: hold for it what saves messages.
    schema=f"(Tensor q, Tensor k, Tensor v, *, {_OPTIONS}, bool wide, bool gradients, bool keep) "
    "-> (Tensor out, Tensor lse, Tensor[] held)",
)
def _forward(
    q: Tensor, k: Tensor, v: Tensor, *, wide: bool, gradients: bool, keep: bool, **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    _check(q, k, **options)
    call = _call(q, k, v, **options)
    stated = {"sinks": "given" if wide else "None", "requires_grad": gradients, "kept for backward": keep}
    _agree(q, k, v, options | stated)
    return attention_forward_over_ranks(q, k, v, call, wide=wide, keep=keep)


@torch.library.custom_op(
    f"{NAME}_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor[] held, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
)
def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(q, k, v, **options)
    return attention_backward_over_ranks(dout, dlse, q, k, v, out, lse, held, call)


def _check(
    q: Tensor, k: Tensor, *, shard: int, key_shard: int, strategy: str, ulysses_degree: int | None, **_: Any
) -> None:
    """Refuse what does not fit the shards: what this rank can tell alone, before any message."""
    queries, keys = shard_of(shard), shard_of(key_shard)
    check_shard(queries, batch=q.shape[0])
    check_tokens("q", q, queries)
    if keys is not queries:
        _check_key_shard(queries, keys)
    check_tokens("k", k, keys, name="shard" if keys is queries else "key_shard")
    rows = queries.grid.outer_size
    check_strategy(strategy, ulysses_degree, heads=q.shape[2], ranks=queries.world, rows=rows)


def _check_key_shard(shard: SequenceShard, key_shard: SequenceShard) -> None:
    if not same_group(shard.group, key_shard.group) or (shard.rank, shard.world) != (key_shard.rank, key_shard.world):
        raise ValueError(f"key_shard: got {key_shard}, expected a shard over the same group as {shard}")
    if key_shard.documents != shard.documents:
        raise ValueError(
            f"key_shard: got {key_shard.documents} documents, expected {shard.documents} as in shard: document n of "
            "the queries sees document n of the keys"
        )


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shard: int,
    key_shard: int,
    causal: bool,
    left: int | None,
    right: int | None,
    scale: float,
    softcap: float | None,
    strategy: str,
    ulysses_degree: int | None,
    heads_at_once: int | None,
    backend: str,
) -> AttentionCall:
    queries, keys = shard_of(shard), shard_of(key_shard)
    window = None if left is None and right is None else (left, right)
    chosen, degree = choose(
        strategy,
        ulysses_degree,
        sizes=Heads.of(q, k, v, at_once=heads_at_once),
        device=q.device,
        shard=queries,
        key_shard=keys,
        causal=causal,
        window=window,
    )
    return AttentionCall(
        shard=queries,
        key_shard=keys,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        strategy=chosen,
        degree=degree,
        backend=backend,
        heads_at_once=heads_at_once,
    )


def _agree(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
    """Before the first message: the ranks must have been given the same, but for the tokens that each holds."""
    shard, key_shard = shard_of(options["shard"]), shard_of(options["key_shard"])
    left, right = options.pop("left"), options.pop("right")
    signature = {
        "operator": "sequence_parallel_attention",
        "q": tensor_signature(q),
        "k": tensor_signature(k),
        "v": tensor_signature(v),
        **options,
        "shard": shard.signature,
        "key_shard": "shard" if key_shard is shard else key_shard.signature,
        "window": None if left is None and right is None else (left, right),
    }
    agree(shard, signature, device=q.device)


@_forward.register_fake
def _forward_shapes(
    q: Tensor, k: Tensor, v: Tensor, *, wide: bool, gradients: bool, keep: bool, **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    if isinstance(options["shard"], int) and isinstance(options["key_shard"], int):  # not symbols of a compiler
        _check(q, k, **options)
    out, lse = _results(q, v, wide=wide)
    return out, lse, _held_shapes(q, k, v, _call(q, k, v, **options), wide=wide) if keep else []


def _results(q: Tensor, v: Tensor, *, wide: bool) -> tuple[Tensor, Tensor]:
    """Empty out and lse."""
    state = accumulation_dtype(q.dtype)
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=state if wide else q.dtype)
    return out, q.new_empty(q.shape[:3], dtype=state)


def _held_shapes(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *, wide: bool) -> list[Tensor]:
    """Empty tensors shaped as what forward holds."""
    if call.strategy == "gather":
        return []
    held: list[Tensor] = []
    if call.degree > 1:
        exchange = HeadExchange(call.shard, call.key_shard, degree=call.degree, heads=q.shape[2], groups=k.shape[2])
        queries, keys = exchange.tokens
        heads, groups = exchange.shares
        q = q.new_empty((q.shape[0], queries, heads, q.shape[3]))
        k, v = (x.new_empty((x.shape[0], keys, groups, x.shape[3])) for x in (k, v))
        held = [q, k, v, *_results(q, v, wide=wide)]
    plan = ring.plan_of(call)
    if plan.travels:
        held += [x.new_empty((x.shape[0], plan.last_size, *x.shape[2:])) for x in (k, v)]
    return held


@_backward.register_fake
def _backward_shapes(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    held: list[Tensor],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, Tensor, list[Tensor]],
) -> None:
    out, lse, held = output
    own = (*inputs, out, lse)
    if len(held) > 2:  # all of them by heads: of the tensors by tokens only shapes and dtypes are needed
        own = tuple(x.new_empty(()).expand(x.shape) for x in own)
    ctx.save_for_backward(*own, *held)
    ctx.options = {name: value for name, value in keyword_only_inputs.items() if name in _NAMES}
    if not torch.compiler.is_compiling():  # a handle keeps no shard alive
        ctx.shards = shard_of(ctx.options["shard"]), shard_of(ctx.options["key_shard"])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None, dheld: Any) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *held = ctx.saved_tensors
    if dout is None:  # this rank's loss uses lse alone; the other ranks wait for its share all the same
        dout = torch.zeros_like(out)
    gradients = _backward(dout, dlse, q, k, v, out, lse, held, **ctx.options)
    return tuple(x if needed else None for x, needed in zip(gradients, ctx.needs_input_grad, strict=False))


_forward.register_autograd(_differentiate, setup_context=_save)
forward, backward = _forward, _backward
