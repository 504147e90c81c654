"""Retention: rotated linear attention with a fixed decay per head, a norm per head and a swish gate."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_heads, check_scan_strategy
from longtrain.layers.recurrence import MemoryState, positions, scan_linear_attention
from longtrain.layers.rotary import rotate
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class RetentionConfig:
    """Options of the retention mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K; None: width / heads
    value_width: int | None = None  # V of a head; None: 2 K
    rope_base: float = 10_000.0  # rotary wavelengths reach 2 pi times this many tokens
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def widths(self, width: int) -> tuple[int, int]:
        """K and V."""
        key = width // self.heads if self.head_width is None else self.head_width
        return key, 2 * key if self.value_width is None else self.value_width


class RetentionMixer(StatefulMixer):
    """``y = W_o (swish(W_g x) * GroupNorm(o))``, ``S_t = gamma S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t / sqrt(K)``.

    "Retentive Network: A Successor to Transformer for Large Language Models", equations 5 to 8: q and k are rotated by
    the position in the document (the paper's Theta, the rotation of xPos, whose decay is gamma), head h = 0 ... H-1
    forgets with ``gamma = 1 - 2^(-5 - h)``, values are twice as wide as keys, and the group norm (a group per head, no
    weights: W_o has them) takes each head's mean and scale out. Time and memory per token do not grow with the
    sequence.
    """

    name: ClassVar[str] = "retention"
    Config: ClassVar[type[RetentionConfig]] = RetentionConfig
    log_decay: Tensor

    @classmethod
    def check(cls, config: RetentionConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_heads(config.heads, config.head_width, place)
        key, value = config.widths(place.width)
        if key % 2 or key < 2:
            raise ValueError(f"head_width: got {key}, rotary positions need an even number from 2 on")
        if value < 2:
            raise ValueError(f"value_width: got {value}, the norm of a head needs at least 2")
        if not config.rope_base > 1:
            raise ValueError(f"rope_base: got {config.rope_base}, it must be above 1")

    @classmethod
    def mixing_flops(cls, config: RetentionConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        key, value = config.widths(place.width)
        return 4.0 * config.heads * key * value

    def __init__(self, config: RetentionConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.key_width, self.value_width = config.widths(place.width)
        self.rope_base = config.rope_base
        keys, values = config.heads * self.key_width, config.heads * self.value_width
        self.qkvg = nn.Linear(place.width, 2 * keys + 2 * values, bias=False)
        self.out = nn.Linear(values, place.width, bias=False)
        forgotten = 2.0 ** (-5 - torch.arange(config.heads, dtype=torch.float64))
        self.register_buffer("log_decay", torch.log1p(-forgotten).float(), persistent=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        return MemoryState.empty((batch, len(self.log_decay), self.key_width, self.value_width), device, dtype)

    def scan(self, x: Tensor, shard: SequenceShard, state: MemoryState | None) -> tuple[Tensor, MemoryState | None]:
        heads = len(self.log_decay)
        keys, values = heads * self.key_width, heads * self.value_width
        q, k, v, gate = self.qkvg(x).split((keys, keys, values, values), dim=-1)
        q, k, v = (z.unflatten(-1, (heads, -1)) for z in (q, k, v))
        at = positions(shard, x.device, state)
        q, k = rotate(q, at, base=self.rope_base), rotate(k, at, base=self.rope_base)
        o, memory = scan_linear_attention(
            q, k, v, self.log_decay, shard, None if state is None else state.memory, strategy=self.strategy
        )
        o = F.layer_norm(o, (self.value_width,), eps=1e-6).flatten(2)
        return self.out(F.silu(gate) * o), None if state is None else state.after(x.shape[1], memory)
