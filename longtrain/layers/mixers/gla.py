"""Gated linear attention: a decay of its own for every channel of the keys and every token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_divides, check_scan_strategy
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import MemoryState, scan_linear_attention, state_dtype
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class GLAConfig:
    """Options of the gla mixer."""

    heads: int = 4  # H
    key_width: int | None = None  # K of a head; None: width / heads / 2
    value_width: int | None = None  # V of a head; None: width / heads
    gate_rank: int = 16  # the decays' projection goes through so many channels
    gate_temperature: float = 16.0  # tau: the larger, the slower they forget
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def widths(self, width: int) -> tuple[int, int]:
        """K and V."""
        key = width // self.heads // 2 if self.key_width is None else self.key_width
        return key, width // self.heads if self.value_width is None else self.value_width


class GLAMixer(StatefulMixer):
    """``y = W_o (swish(W_r x) * norm(o))``, ``S_t = diag(alpha_t) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t / sqrt(K)``.

    "Gated Linear Attention Transformers with Hardware-Efficient Training", section 4: the decays come from the token,
    ``alpha_t = sigmoid(W_2 W_1 x_t + b)^(1 / tau)`` with a W_1 of few rows (equation 3 and section 4.4), so that the
    layer chooses what it keeps; the norm is per head, with one learned weight per value channel. Keys are half as wide
    as values. No positions: the decays carry them. Time and memory per token do not grow with the sequence.
    """

    name: ClassVar[str] = "gla"
    Config: ClassVar[type[GLAConfig]] = GLAConfig

    @classmethod
    def check(cls, config: GLAConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        if config.heads < 1:
            raise ValueError(f"heads: got {config.heads}, it must be at least 1")
        for option, parts in (("key_width", 2 * config.heads), ("value_width", config.heads)):
            given = getattr(config, option)
            if given is None:
                whole = "model.width" if parts == config.heads else "model.width / 2"
                total = place.width * config.heads // parts
                check_divides("heads", config.heads, whole, total, otherwise=f" (or give {option})")
            elif given < 1:
                raise ValueError(f"{option}: got {given}, it must be at least 1")
        if config.gate_rank < 1:
            raise ValueError(f"gate_rank: got {config.gate_rank}, it must be at least 1")
        if not 0 < config.gate_temperature < float("inf"):
            raise ValueError(f"gate_temperature: got {config.gate_temperature}, it must be above 0")

    @classmethod
    def mixing_flops(cls, config: GLAConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        key, value = config.widths(place.width)
        return 4.0 * config.heads * key * value

    def __init__(self, config: GLAConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.temperature = config.heads, config.gate_temperature
        self.key_width, self.value_width = config.widths(place.width)
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        self.qkvg = nn.Linear(place.width, 2 * keys + 2 * values, bias=False)
        self.decay_in = nn.Linear(place.width, config.gate_rank, bias=False)
        self.decay_out = nn.Linear(config.gate_rank, keys)
        nn.init.zeros_(self.decay_out.bias)
        self.norm = RMSNorm(self.value_width, eps=1e-6)
        self.out = nn.Linear(values, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        return MemoryState.empty((batch, self.heads, self.key_width, self.value_width), device, dtype)

    def scan(self, x: Tensor, shard: SequenceShard, state: MemoryState | None) -> tuple[Tensor, MemoryState | None]:
        keys, values = self.heads * self.key_width, self.heads * self.value_width
        q, k, v, gate = self.qkvg(x).split((keys, keys, values, values), dim=-1)
        logits = self.decay_out(self.decay_in(x))
        log_decay = F.logsigmoid(logits.to(state_dtype(logits.dtype))) / self.temperature
        q, k, v, log_decay = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v, log_decay))
        o, memory = scan_linear_attention(
            q, k, v, log_decay, shard, None if state is None else state.memory, strategy=self.strategy
        )
        o = self.norm(o).flatten(2)
        return self.out(F.silu(gate) * o), None if state is None else state.after(x.shape[1], memory)
