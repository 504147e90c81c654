"""Gated DeltaNet: the delta rule on a state that each head forgets at a rate of the token's choice."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_divides, check_scan_strategy
from longtrain.layers.mixers.heads import DeltaHeads, check_delta_heads
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_delta_rule
from longtrain.layers.selective import SelectiveDecay, strength, unit
from longtrain.layers.short_convolution import ConvolvedState, ShortConvolution, check_conv_width
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaHeads):
    """Options of the gated_deltanet mixer."""

    key_heads: int | None = None  # G, heads of queries and keys, which value heads share; None: as many as heads
    conv_width: int = 4  # tokens that the short convolutions of q, k and v see
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    @property
    def groups(self) -> int:
        return self.heads if self.key_heads is None else self.key_heads


class GatedDeltaNetMixer(StatefulMixer):
    """``y = W_o (norm(o) * silu(W_g x))`` with, for each head and a_t, beta_t between 0 and 1,

        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = K^-1/2 q_t S_t.

    "Gated Delta Networks: Improving Mamba2 with Delta Rule", equation 10 and section 3.3: q, k and v are convolved over
    a few tokens and pass through SiLU, q and k have length 1, ``beta = sigmoid(W_b x)``, and ``a = exp(-exp(A_log) *
    softplus(W_a x + dt_bias))`` as in Mamba2. Value heads may share queries and keys, as in Qwen3-Next. Time and memory
    per token do not grow with the sequence.
    """

    name: ClassVar[str] = "gated_deltanet"
    Config: ClassVar[type[GatedDeltaNetConfig]] = GatedDeltaNetConfig

    @classmethod
    def check(cls, config: GatedDeltaNetConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_delta_heads(config, place)
        check_divides("key_heads", config.groups, "heads", config.heads)
        check_conv_width(config.conv_width)

    @classmethod
    def mixing_flops(cls, config: GatedDeltaNetConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """6 H K V: what the key held is read, the change is added, the query reads."""
        key_width, value_width = config.widths(place.width)
        return 6.0 * config.heads * key_width * value_width

    def __init__(self, config: GatedDeltaNetConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads = config.heads
        self.key_width, self.value_width = config.widths(place.width)
        keys, values = config.groups * self.key_width, self.heads * self.value_width
        self.sizes = keys, keys, values
        self.qkv = nn.Linear(place.width, sum(self.sizes), bias=False)
        self.convolution = ShortConvolution(sum(self.sizes), config.conv_width)
        self.rates = nn.Linear(place.width, 2 * self.heads, bias=False)  # for beta, then for the decay
        self.decay = SelectiveDecay(self.heads)
        self.gate = nn.Linear(place.width, values, bias=False)
        self.norm = RMSNorm(self.value_width, eps=1e-6)
        self.out = nn.Linear(values, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> ConvolvedState:
        return self.convolution.empty_state((batch, self.heads, self.key_width, self.value_width), device, dtype)

    def scan(
        self, x: Tensor, shard: SequenceShard, state: ConvolvedState | None
    ) -> tuple[Tensor, ConvolvedState | None]:
        inputs, memory = (None, None) if state is None else state
        qkv, inputs = self.convolution(self.qkv(x), shard, inputs)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = (unit(z.unflatten(-1, (-1, self.key_width))) for z in (q, k))
        v = v.unflatten(-1, (self.heads, self.value_width))
        beta, rate = self.rates(x).chunk(2, dim=-1)
        _, log_decay = self.decay(rate)
        o, memory = scan_delta_rule(q, k, v, strength(beta), log_decay, shard, memory, strategy=self.strategy)
        o = self.norm(o).flatten(2) * F.silu(self.gate(x))
        return self.out(o), ConvolvedState.of(inputs, memory)
