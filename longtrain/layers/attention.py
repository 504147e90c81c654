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
        ulysses_degree: the ranks that exchange heads, for strategy ``"mesh"``; None lets the cost model choose.
        backend: which kernels compute a tile.
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
        backend: str = "auto",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
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
        """q ``[B, T_w, H, K]``, k ``[B, S_w, G, K]``, v ``[B, S_w, G, V]`` -> ``[B, T_w, H, V]`` in q's dtype.

        S_w is T_w, or with `key_shard` the tokens that this rank holds of that. sinks: ``[H]``.
        """
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
            ulysses_degree=self.ulysses_degree,
            backend=self.backend,
        )
        return out

    def extra_repr(self) -> str:
        names = ("causal", "window", "scale", "softcap", "strategy", "ulysses_degree", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
