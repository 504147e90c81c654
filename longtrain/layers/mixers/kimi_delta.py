"""Kimi Delta Attention: the delta rule on a state of which each channel is forgotten at its own rate."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_heads, check_scan_strategy
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_delta_rule
from longtrain.layers.selective import SelectiveDecay, strength, unit
from longtrain.layers.short_convolution import ConvolvedState, ShortConvolution, check_conv_width
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class KimiDeltaConfig:
    """Options of the kimi_delta mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K and V; None: width / heads
    rank: int | None = None  # of the projections for the decays and for the output's gate; None: as head_width
    conv_width: int = 4  # tokens that the short convolutions of q, k and v see
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


class KimiDeltaMixer(StatefulMixer):
    """``y = W_o (norm(o) * sigmoid(W_g2 W_g1 x))`` with, for each head, a_t in [0, 1]^K and beta_t between 0 and 1,

        S_t = (I - beta_t k_t k_t^T) diag(a_t) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-1/2 q_t S_t.

    "Kimi Linear: An Expressive, Efficient Attention Architecture", equation 1 and section 4: q, k and v are convolved
    over a few tokens and pass through SiLU, q and k have length 1, ``beta = sigmoid(W_b x)``, and ``a = exp(-exp(A_log)
    * softplus(W_a2 W_a1 x + dt_bias))`` with A_log per head and dt_bias per channel. Time and memory per token do not
    grow with the sequence.
    """

    name: ClassVar[str] = "kimi_delta"
    Config: ClassVar[type[KimiDeltaConfig]] = KimiDeltaConfig

    @classmethod
    def check(cls, config: KimiDeltaConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_heads(config.heads, config.head_width, place)
        if config.rank is not None and config.rank < 1:
            raise ValueError(f"rank: got {config.rank}, it must be at least 1")
        check_conv_width(config.conv_width)

    @classmethod
    def mixing_flops(cls, config: KimiDeltaConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """6 H K V: what the key held is read, the change is added, the query reads."""
        return 6.0 * config.heads * config.key_width(place.width) ** 2

    def __init__(self, config: KimiDeltaConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads = config.heads
        self.key_width = config.key_width(place.width)
        inner = self.heads * self.key_width
        rank = self.key_width if config.rank is None else config.rank
        self.qkv = nn.Linear(place.width, 3 * inner, bias=False)
        self.convolution = ShortConvolution(3 * inner, config.conv_width)
        self.beta = nn.Linear(place.width, self.heads, bias=False)
        self.low = nn.Linear(place.width, 2 * rank, bias=False)  # for the decays, then for the gate
        self.rates = nn.Linear(rank, inner, bias=False)
        self.gate = nn.Linear(rank, inner, bias=False)
        self.decay = SelectiveDecay(self.heads, self.key_width)
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
        for_decay, for_gate = self.low(x).chunk(2, dim=-1)
        _, log_decay = self.decay(self.rates(for_decay))
        o, memory = scan_delta_rule(
            unit(q), unit(k), v, strength(self.beta(x)), log_decay, shard, memory, strategy=self.strategy
        )
        o = self.norm(o).flatten(2) * torch.sigmoid(self.gate(for_gate))
        return self.out(o), ConvolvedState.of(inputs, memory)
