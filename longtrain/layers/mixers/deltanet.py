"""DeltaNet: linear attention that replaces what a key held instead of adding to it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_heads, check_scan_strategy
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_delta_rule
from longtrain.layers.selective import strength, unit
from longtrain.layers.short_convolution import ConvolvedState, ShortConvolution, check_conv_width
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class DeltaNetConfig:
    """Options of the deltanet mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K and V; None: width / heads
    conv_width: int | None = 4  # tokens that the short convolutions of q, k and v see; None: no convolutions
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


class DeltaNetMixer(StatefulMixer):
    """``y = W_o norm(o)``, ``S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T``, ``o_t = K^-1/2 q_t S_t``.

    "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", equations 5 and 6 and section 3.4:
    q, k and v are convolved over a few tokens and pass through SiLU, q and k have length 1, ``beta = sigmoid(W_b x)``,
    and the output of each head is RMS-normalised. Time and memory per token do not grow with the sequence.
    """

    name: ClassVar[str] = "deltanet"
    Config: ClassVar[type[DeltaNetConfig]] = DeltaNetConfig

    @classmethod
    def check(cls, config: DeltaNetConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_heads(config.heads, config.head_width, place)
        check_conv_width(config.conv_width)

    @classmethod
    def mixing_flops(cls, config: DeltaNetConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """6 H K V: what the key held is read, the change is added, the query reads."""
        return 6.0 * config.heads * config.key_width(place.width) ** 2

    def __init__(self, config: DeltaNetConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads = config.heads
        self.key_width = config.key_width(place.width)
        inner = self.heads * self.key_width
        self.qkv = nn.Linear(place.width, 3 * inner, bias=False)
        self.convolution = ShortConvolution(3 * inner, config.conv_width)
        self.beta = nn.Linear(place.width, self.heads, bias=False)
        self.norm = RMSNorm(self.key_width, eps=1e-6)
        self.out = nn.Linear(inner, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> ConvolvedState:
        return self.convolution.empty_state((batch, self.heads, self.key_width, self.key_width), device, dtype)

    def scan(
        self, x: Tensor, shard: SequenceShard, state: ConvolvedState | None
    ) -> tuple[Tensor, ConvolvedState | None]:
        inputs, memory = (None, None) if state is None else state
        qkv, inputs = self.convolution(self.qkv(x), shard, inputs)
        q, k, v = (z.unflatten(-1, (self.heads, self.key_width)) for z in qkv.chunk(3, dim=-1))
        o, memory = scan_delta_rule(
            unit(q), unit(k), v, strength(self.beta(x)), None, shard, memory, strategy=self.strategy
        )
        return self.out(self.norm(o).flatten(2)), ConvolvedState.of(inputs, memory)
