"""Softmax attention over a sequence that is spread over the ranks of a group.

What a rank's queries see of another rank's keys is one interval of keys per query, whatever the layout, mask and
documents (`SequenceShard.intervals`). So there is one kernel, one ring and one backward for all of them, and a group of
one rank runs the same code without a message.

    __init__      the public function and its checks
    choice        which strategy runs; cost: the model that "auto" asks
    operators     the registered operator pair, with the handshake
    strategies    what each strategy does, in terms of
    ring          keys travel point to point; plan, needs: what is sent to whom in which step
    gather        keys are gathered, some heads at a time
    ..heads       tokens are exchanged for heads (one folder up)

Letters: B batch, T_w tokens on this rank, S_w keys on this rank, H query heads, G key/value heads, K query/key width,
V value width, W ranks. The state dtype is float32 (float64 for float64 inputs).
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.softmax_attention import apply_sinks
from longtrain.parallel.attention import operators
from longtrain.parallel.attention.call import Window
from longtrain.parallel.attention.choice import STRATEGIES, check_heads_at_once, check_strategy_types
from longtrain.parallel.saving import saved_as_it_is
from longtrain.parallel.shard import SequenceShard

__all__ = ["STRATEGIES", "sequence_parallel_attention"]


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
    heads_at_once: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention of this rank's queries to the keys of all ranks; the same numbers as on one device.

    All ranks of the group make the same call, and all of them run its backward pass or none does. Compiled
    (``torch.compile``), the shard must be kept until then.

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
        strategy: ``"ring"``: keys travel point to point, each only to ranks that see it; over a two-dimensional mesh a
            ring inside each row and one between the rows. ``"allgather"``: all keys to all ranks, some heads at a time.
            ``"ulysses"``: ranks exchange tokens for heads; W must divide H. ``"mesh"``: Ulysses among neighbours, a
            ring outside. ``"auto"``: what the cost model finds fastest (``longtrain.parallel.attention.cost``).
        ulysses_degree: for ``"mesh"``, the ranks that exchange heads; a divisor of H and of the ranks in a row. None:
            the model chooses, between 1 and W where there is such a divisor, otherwise 1 (a ring) or W (Ulysses).
        heads_at_once: key heads that go through forward and backward at a time, with their query heads: float32 results
            and gradients live for these alone, and the same bytes travel in more messages. The numbers do not change.
            With Ulysses, of the heads that a rank works on. None: all of them.
        backend: which kernels compute a tile, as in ``softmax_attention``.

    Returns:
        out ``[B, T_w, H, V]`` in q's dtype and lse ``[B, T_w, H]`` in the state dtype, the natural log of the softmax's
        denominator without sinks; both differentiable. A query that sees no key gets 0 and -inf, and zero gradients.

    Raises:
        ValueError: what cannot work: at once where this rank can see it alone (the others then wait for it: it must not
            go on to other calls); on all ranks where they disagree.
    """
    keys = shard if key_shard is None else key_shard
    _check_tensors(q, k, v, sinks)
    for name, given in (("shard", shard), ("key_shard", keys)):
        if not isinstance(given, SequenceShard):
            raise ValueError(f"{name}: got {type(given).__name__}, expected a SequenceShard")
    if not isinstance(causal, bool):
        raise ValueError(f"causal: got {causal!r}, expected True or False")
    check_strategy_types(strategy, ulysses_degree)
    check_heads_at_once(heads_at_once)
    window = checks.attention_window(window)
    factor, cap = checks.number("scale", scale), checks.number("softcap", softcap, positive=True)
    widths = {"K": q.shape[3], "V": v.shape[3]}
    backend = choose_backend("softmax_attention", backend, device=q.device, dtype=q.dtype, widths=widths)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    left, right = window if window is not None else (None, None)
    out, lse, _ = operators.forward(
        q,
        k,
        v,
        shard=shard.handle,
        key_shard=keys.handle,
        causal=causal,
        left=left,
        right=right,
        scale=q.shape[3] ** -0.5 if factor is None else factor,
        softcap=cap,
        strategy=strategy,
        ulysses_degree=ulysses_degree,
        heads_at_once=heads_at_once,
        backend=backend,
        wide=sinks is not None,
        gradients=gradients,
        keep=gradients and saved_as_it_is(),
    )
    return out if sinks is None else apply_sinks(out, lse, sinks).to(q.dtype), lse


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
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if forward_ad.unpack_dual(x).tangent is not None:
                raise ValueError(f"{name}: got a tensor with a forward-mode tangent, expected reverse mode (backward)")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: got dtype {x.dtype}, expected that of q, {q.dtype}")
