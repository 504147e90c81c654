"""Gated slot attention: softmax attention over a fixed number of slots that tokens are written into."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_heads, check_scan_strategy
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_slot_attention, state_dtype
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class GatedSlotConfig:
    """Options of the gsa mixer."""

    heads: int = 4  # H
    head_width: int | None = None  # K and V; None: width / heads
    slots: int = 64  # M, for each head
    damping: float = 8.0  # the root that is taken of a slot's forget gate: larger forgets more slowly
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


class GatedSlotState(NamedTuple):
    """What generation keeps: the slots' keys and values."""

    keys: Tensor  # A [B, H, K, M]
    values: Tensor  # C [B, H, M, V]


class GatedSlotMixer(StatefulMixer):
    """``y = W_o norm(silu(o))`` with, for each head and a_t = sigmoid(W_a x_t)^(1 / damping) in [0, 1]^M,

        A_t = A_{t-1} diag(a_t) + k_t (1 - a_t)^T,  C_t = diag(a_t) C_{t-1} + (1 - a_t) v_t^T,
        o_t = softmax(q_t A_t) C_t.

    "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", equations 7 to 10 and section 3.3: what a slot
    holds is a running average of keys and of values; q, k and v pass through SiLU. Time and memory per token do not
    grow with the sequence.
    """

    name: ClassVar[str] = "gsa"
    Config: ClassVar[type[GatedSlotConfig]] = GatedSlotConfig

    @classmethod
    def check(cls, config: GatedSlotConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_heads(config.heads, config.head_width, place)
        if config.slots < 1:
            raise ValueError(f"slots: got {config.slots}, it must be at least 1")
        if not 0 < config.damping < float("inf"):
            raise ValueError(f"damping: got {config.damping}, it must be above 0 and finite")

    @classmethod
    def mixing_flops(cls, config: GatedSlotConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """4 H M (K + V): the slots' keys and values are each added to and read once."""
        return 8.0 * config.heads * config.slots * config.key_width(place.width)

    def __init__(self, config: GatedSlotConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.slots, self.damping = config.heads, config.slots, config.damping
        self.key_width = config.key_width(place.width)
        inner = self.heads * self.key_width
        self.qkv = nn.Linear(place.width, 3 * inner, bias=False)
        self.forget = nn.Linear(place.width, self.heads * self.slots, bias=False)
        self.norm = RMSNorm(inner, eps=1e-6)
        self.out = nn.Linear(inner, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> GatedSlotState:
        keys = torch.zeros(batch, self.heads, self.key_width, self.slots, device=device, dtype=state_dtype(dtype))
        return GatedSlotState(keys, keys.transpose(2, 3).clone())

    def scan(
        self, x: Tensor, shard: SequenceShard, state: GatedSlotState | None
    ) -> tuple[Tensor, GatedSlotState | None]:
        q, k, v = (z.unflatten(-1, (self.heads, self.key_width)) for z in F.silu(self.qkv(x)).chunk(3, dim=-1))
        forget = self.forget(x)
        log_decay = F.logsigmoid(forget.to(state_dtype(forget.dtype))) / self.damping
        log_decay = log_decay.unflatten(-1, (self.heads, self.slots))
        # 1 - exp(x), which keeps its digits where next to nothing is written.
        write = -torch.expm1(log_decay)
        o, after = scan_slot_attention(q, k, v, write, log_decay, shard, state, scale=1.0, strategy=self.strategy)
        y = self.out(self.norm(F.silu(o).flatten(2)))
        return y, None if after is None else GatedSlotState(*after)
