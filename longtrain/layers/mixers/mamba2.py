"""Mamba2: a state space model per head, which is linear attention with a decay of the token's choice."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_divides, check_scan_strategy
from longtrain.layers.recurrence import scan_linear_attention
from longtrain.layers.selective import SelectiveDecay
from longtrain.layers.short_convolution import ConvolvedState, ShortConvolution, check_conv_width
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class Mamba2Config:
    """Options of the mamba2 mixer."""

    heads: int = 8  # H, of width expand * width / heads
    expand: int = 2  # all heads together are so many times as wide as the model
    state_width: int = 64  # K (the paper's N): numbers that each channel keeps
    groups: int = 1  # G, heads of B and C, which the heads share
    conv_width: int = 4  # tokens that the short convolution of x, B and C sees
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses


class Mamba2Mixer(StatefulMixer):
    """``y = W_o norm((o + D x) * silu(z))`` with, for each head and dt_t > 0,

        S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t B_t x_t^T,  o_t = C_t S_t.

    "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    equations 1 and 16 and section 7: z, x, B, C and dt are projections of the input; x, B and C are convolved over a
    few tokens and pass through SiLU, ``dt = softplus(. + dt_bias)``, and the RMS norm is over the heads that share one
    B and one C. As linear attention C is the query, B the key and ``dt x`` the value. Time and memory per token do not
    grow with the sequence.
    """

    name: ClassVar[str] = "mamba2"
    Config: ClassVar[type[Mamba2Config]] = Mamba2Config

    @classmethod
    def check(cls, config: Mamba2Config, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        for option in ("heads", "expand", "state_width"):
            if getattr(config, option) < 1:
                raise ValueError(f"{option}: got {getattr(config, option)}, it must be at least 1")
        inner = config.expand * place.width
        check_divides("heads", config.heads, "expand * model.width", inner)
        check_divides("groups", config.groups, "heads", config.heads)
        check_conv_width(config.conv_width)

    @classmethod
    def mixing_flops(cls, config: Mamba2Config, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        return 4.0 * config.state_width * config.expand * place.width

    def __init__(self, config: Mamba2Config, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups = config.heads, config.groups
        self.state_width = config.state_width
        inner = config.expand * place.width
        self.head_width = inner // self.heads
        self.sizes = inner, self.groups * self.state_width, self.groups * self.state_width  # x, B and C
        self.inputs = nn.Linear(place.width, inner + sum(self.sizes) + self.heads, bias=False)  # z, x, B, C and dt
        self.convolution = ShortConvolution(sum(self.sizes), config.conv_width, bias=True)
        self.decay = SelectiveDecay(self.heads)
        self.skip = nn.Parameter(torch.ones(self.heads))  # D
        self.norm = nn.Parameter(torch.ones(inner))
        self.out = nn.Linear(inner, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> ConvolvedState:
        return self.convolution.empty_state((batch, self.heads, self.state_width, self.head_width), device, dtype)

    def scan(
        self, x: Tensor, shard: SequenceShard, state: ConvolvedState | None
    ) -> tuple[Tensor, ConvolvedState | None]:
        inputs, memory = (None, None) if state is None else state
        inner = self.sizes[0]
        z, convolved, step = self.inputs(x).split((inner, sum(self.sizes), self.heads), dim=-1)
        convolved, inputs = self.convolution(convolved, shard, inputs)
        value, key, query = convolved.split(self.sizes, dim=-1)
        key, query = (part.unflatten(-1, (self.groups, self.state_width)) for part in (key, query))
        value = value.unflatten(-1, (self.heads, self.head_width))
        step, log_decay = self.decay(step)
        weighted = (value * step[..., None]).to(value.dtype)
        o, memory = scan_linear_attention(
            query, key, weighted, log_decay, shard, memory, scale=1.0, strategy=self.strategy
        )
        o = (o + self.skip[:, None] * value).flatten(2) * F.silu(z)
        grouped = F.rms_norm(o.unflatten(-1, (self.groups, -1)), (inner // self.groups,), eps=1e-5)
        return self.out(self.norm * grouped.flatten(2)), ConvolvedState.of(inputs, memory)
