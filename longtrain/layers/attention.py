"""Sequence-parallel softmax attention as a module, for models that project q, k and v themselves."""

from torch import Tensor, nn

from longtrain.parallel import SequenceShard, sequence_parallel_attention


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
        backend: which kernels compute a tile.
    """

    def __init__(
        self,
        *,
        causal: bool = True,
        window: tuple[int | None, int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        strategy: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.causal = causal
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.strategy = strategy
        self.backend = backend

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
        """q ``[B, T_w, H, K]``, k ``[B, T_w, G, K]``, v ``[B, T_w, G, V]`` -> ``[B, T_w, H, V]`` in q's dtype."""
        out, _ = sequence_parallel_attention(
            q,
            k,
            v,
            shard,
            key_shard=key_shard,
            causal=self.causal,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            strategy=self.strategy,
            backend=self.backend,
        )
        return out

    def extra_repr(self) -> str:
        return f"causal={self.causal}, window={self.window}, strategy={self.strategy!r}, backend={self.backend!r}"
