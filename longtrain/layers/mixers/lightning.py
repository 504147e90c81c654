"""Lightning attention: linear attention with a fixed decay per head, gated output and its own norm."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_heads, state_dtype
from longtrain.layers.recurrence import scan_linear_attention
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class LightningConfig:
    """Options of the lightning mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K and V; None: width / heads

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


def head_log_decays(heads: int, place: LayerPlace) -> Tensor:
    """Log-decay of each head, ``[H]`` float32, all below 0: from short memory to long, longer in deeper layers.

    ``-2^(-8 h / H) * (1 - l / L)`` for h = 1 ... H and layer l = 0 ... L-1 of L: the slopes of "Train Short, Test Long"
    (as in the authors' code), scaled by depth as in "Scaling TransNormer to 175 Billion Parameters", section 3.1.2.
    """
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return (-(2.0 ** (-8 * head / heads)) * (1 - place.index / place.depth)).float()


class LightningState(NamedTuple):
    """What generation keeps."""

    memory: Tensor  # S [B, H, K, V]


class LightningMixer(StatefulMixer):
    """``y = W_o (norm(o) * sigmoid(W_g x))`` with ``S_t = lambda S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``.

    q and k pass through SiLU and are not rotated: the decay carries position. "Scaling TransNormer to 175 Billion
    Parameters" (gated linear attention with its own simple RMS norm, equations 4 to 6) and "Various Lengths, Constant
    Speed: Efficient Language Modeling with Lightning Attention" (equations 3 to 8). Time and memory per token do not
    grow with the sequence.
    """

    name: ClassVar[str] = "lightning"
    Config: ClassVar[type[LightningConfig]] = LightningConfig
    log_decay: Tensor

    @classmethod
    def check(cls, config: LightningConfig, place: LayerPlace) -> None:
        check_heads(config.heads, config.head_width, place)

    @classmethod
    def mixing_flops(cls, config: LightningConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        return 4.0 * config.heads * config.key_width(place.width) ** 2

    def __init__(self, config: LightningConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.key_width = config.key_width(place.width)
        inner = config.heads * self.key_width
        self.qkvg = nn.Linear(place.width, 4 * inner, bias=False)
        self.out = nn.Linear(inner, place.width, bias=False)
        self.register_buffer("log_decay", head_log_decays(config.heads, place), persistent=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> LightningState:
        shape = (batch, len(self.log_decay), self.key_width, self.key_width)
        return LightningState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))

    def scan(
        self, x: Tensor, shard: SequenceShard, state: LightningState | None
    ) -> tuple[Tensor, LightningState | None]:
        inner = self.out.in_features
        qk, v, gate = self.qkvg(x).split((2 * inner, inner, inner), dim=-1)
        q, k = F.silu(qk).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, self.key_width)) for z in (q, k, v))
        before = None if state is None else state.memory
        o, memory = scan_linear_attention(q, k, v, self.log_decay, shard, before)
        # Head by head: the sums of a head that forgets slowly are far larger than those of one that forgets fast.
        o = F.rms_norm(o, (self.key_width,), eps=1e-6).flatten(2)
        return self.out(o * torch.sigmoid(gate)), None if memory is None else LightningState(memory)
