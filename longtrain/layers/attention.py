"""Sequence-parallel softmax attention as a module, for models that project q, k and v themselves."""

import torch
from torch import Tensor, nn

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.attention.choice import check_heads_at_once
from longtrain.parallel.attention.cost import Heads
from longtrain.parallel.attention.relaying import (
    AUTO,
    HOME,
    attention_shard,
    check_layout,
    moved,
    prepare_attention,
)


class SequenceParallelAttention(nn.Module):
    """Exact softmax attention over a sequence that is spread over the ranks of a shard.

    Takes projected q, k and v and hides nothing: no projection, no rotary embedding, no dropout. Rotate q and k with
    ``shard.document_positions`` before the call. The options are those of
    :func:`longtrain.parallel.sequence_parallel_attention`.

    Args:
        causal: each query sees keys up to its own position only.
        window: ``(left, right)`` tokens that a query sees on either side of itself; None is unlimited.
        scale: multiplies the scores; None means ``K ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        strategy: how keys and values reach the queries.
        ulysses_degree: the ranks that exchange heads, for strategy ``"mesh"``; None lets the cost model choose.
        heads_at_once: key heads, with their query heads, that go through at a time; None: all.
        backend: which kernels compute a tile.
        layout: where attention runs: ``"home"``, the shard's own layout; a layout's name, to which q, k and v are moved
            and from which the output is moved back, by one all-to-all each; ``"auto"``: the cost model's choice between
            home and ``"balanced"``, for packed documents that leave a hybrid's home layout uneven. Cross-attention
            (`key_shard`) runs at home; with a layout's name it is refused.
        dropout: must be 0. Over ranks every pair of a query and a key is computed twice, in forward and again in
            backward, on tiles whose shape depends on the layout: the same random mask would have to be made again
            there.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        strategy: str = "auto",
        ulysses_degree: int | None = None,
        heads_at_once: int | None = None,
        backend: str = "auto",
        layout: str = "home",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_layout(layout)
        check_heads_at_once(heads_at_once)
        if dropout != 0:
            raise ValueError(
                f"dropout: got {dropout}, expected 0: attention weights are computed again in backward, tile by tile "
                "and rank by rank, and random masks could not be made the same there; drop out activations instead"
            )
        self.causal = causal
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.strategy = strategy
        self.ulysses_degree = ulysses_degree
        self.heads_at_once = heads_at_once
        self.backend = backend
        self.layout = layout

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: SequenceShard,
        *,
        key_shard: SequenceShard | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q ``[B, T_w, H, K]``, k ``[B, S_w, G, K]``, v ``[B, S_w, G, V]`` -> ``[B, T_w, H, V]`` in q's dtype.

        S_w is T_w, or with `key_shard` the tokens that this rank holds of that. sinks: ``[H]``.
        """
        target = self._target(q, k, v, shard, key_shard)
        if target is not shard:
            q, k, v = moved([q, k, v], shard, target)
        out, _ = sequence_parallel_attention(
            q,
            k,
            v,
            target,
            key_shard=key_shard,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            strategy=self.strategy,
            ulysses_degree=self.ulysses_degree,
            heads_at_once=self.heads_at_once,
            backend=self.backend,
        )
        return target.relayout(out, shard, dim=1)

    def prepare(self, shard: SequenceShard, sizes: Heads, *, device: torch.device | str) -> None:
        """Do now, in a data loader say, the host's work for calls on `shard` with tensors of these sizes."""
        prepare_attention(
            shard,
            sizes,
            device=device,
            layout=self.layout,
            strategy=self.strategy,
            ulysses_degree=self.ulysses_degree,
            causal=self.causal,
            window=self.window,
        )

    def _target(
        self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, key_shard: SequenceShard | None
    ) -> SequenceShard:
        """The shard on which this call runs."""
        if key_shard is not None and key_shard is not shard:
            if self.layout not in (HOME, AUTO):
                raise ValueError(f"layout: got {self.layout!r} with a key_shard, expected 'home' or 'auto'")
            return shard
        if self.layout == HOME or q.ndim != 4 or k.ndim != 4 or v.ndim != 4:  # (which the operator refuses)
            return shard
        return attention_shard(
            shard,
            Heads.of(q, k, v, at_once=self.heads_at_once),
            device=q.device,
            layout=self.layout,
            strategy=self.strategy,
            ulysses_degree=self.ulysses_degree,
            causal=self.causal,
            window=self.window,
        )

    def extra_repr(self) -> str:
        names = ("causal", "window", "scale", "softcap", "strategy", "ulysses_degree")
        names += ("heads_at_once", "backend", "layout")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def with_keys(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """One softmax over two key sets, of which the queries have seen one after the other.

    out, other ``[B, T, H, V]`` with their lse ``[B, T, H]`` -> ``[B, T, H, V]`` in out's dtype. The first set shows
    every query a key; of the other it may see none. Differentiable in all four.
    """
    return out + torch.sigmoid(other_lse - lse).to(out.dtype)[..., None] * (other - out)
