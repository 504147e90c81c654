"""Softmax attention with rotary positions and grouped heads, the mixer of Llama-shaped models."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from longtrain.layers.attention import SequenceParallelAttention
from longtrain.layers.mixers.base import LayerPlace, Mixer
from longtrain.layers.rotary import rotate
from longtrain.parallel import SequenceShard
from longtrain.parallel.attention.choice import STRATEGIES, check_strategy


@dataclass(frozen=True)
class SoftmaxConfig:
    """Options of the softmax mixer."""

    heads: int = 8  # H, query heads
    kv_heads: int | None = None  # G, key/value heads that the query heads share; None: as many as heads
    head_width: int | None = None  # K and V; None: width / heads
    rope_base: float = 10_000.0  # rotary wavelengths reach 2 pi times this many tokens
    window: int | None = None  # tokens to the left that a query sees besides itself; None: all
    strategy: str = "auto"  # how keys and values reach the queries (sequence_parallel_attention)

    @property
    def groups(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


class SoftmaxMixer(Mixer):
    """Causal softmax attention: ``y = W_o softmax(R(q) R(k)^T / sqrt(K)) v`` ("Attention Is All You Need", equation 1).

    R is the rotary embedding by the position inside the document. Keys and values may have fewer heads than queries
    ("GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints").
    """

    name: ClassVar[str] = "softmax"
    Config: ClassVar[type[SoftmaxConfig]] = SoftmaxConfig

    @classmethod
    def check(cls, config: SoftmaxConfig, place: LayerPlace) -> None:
        if config.heads < 1:
            raise ValueError(f"heads: got {config.heads}, it must be at least 1")
        if config.groups < 1 or config.heads % config.groups:
            raise ValueError(f"kv_heads: got {config.groups}, it must divide heads = {config.heads}")
        if config.head_width is None and place.width % config.heads:
            raise ValueError(f"heads: got {config.heads}, it must divide model.width = {place.width}")
        if config.key_width(place.width) % 2:
            raise ValueError(f"head_width: got {config.key_width(place.width)}, rotary embedding needs an even width")
        if config.window is not None and config.window < 0:
            raise ValueError(f"window: got {config.window}, it must be 0 or more tokens (null: all)")
        if config.strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {config.strategy!r}, expected one of {', '.join(STRATEGIES)}")

    @classmethod
    def check_ranks(cls, config: SoftmaxConfig, *, strategy: str, ranks: int, rows: int) -> None:
        own = strategy if config.strategy == "auto" else config.strategy
        check_strategy(own, None, heads=config.heads, ranks=ranks, rows=rows)

    def __init__(self, config: SoftmaxConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups = config.heads, config.groups
        self.key_width = config.key_width(place.width)
        self.rope_base = config.rope_base
        self.qkv = nn.Linear(place.width, (self.heads + 2 * self.groups) * self.key_width, bias=False)
        self.out = nn.Linear(self.heads * self.key_width, place.width, bias=False)
        window = None if config.window is None else (config.window, 0)
        self.attention = SequenceParallelAttention(causal=True, window=window, strategy=config.strategy)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.key_width))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        q = rotate(q, shard.document_positions_on(x.device), base=self.rope_base)
        k = rotate(k, shard.document_positions_on(x.device), base=self.rope_base)
        return self.out(self.attention(q, k, v, shard).flatten(2))
