"""Gated slot attention: softmax attention over a fixed number of slots that tokens are written into."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import (
    Boundaries,
    LayerPlace,
    StatefulMixer,
    check_choice,
    check_scan_strategy,
)
from longtrain.layers.mixers.heads import GroupedHeads, check_grouped_heads, check_rotation
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import positions, scan_slot_attention, state_dtype
from longtrain.layers.rotary import rotate
from longtrain.layers.taking import HEADS, PROJECTIONS, Takes
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class GatedSlotConfig(GroupedHeads):
    """Options of the gsa mixer."""

    heads: int = 4  # H, query heads
    slots: int = 64  # M, for each head
    damping: float = 8.0  # the root that is taken of a slot's forget gate: larger forgets more slowly
    # What q, k, v and the heads' outputs pass through: silu, and then outputs are normalised; or none, as in a softmax
    # layer: the slots are its keys and values, scores are divided by sqrt(K), and nothing is normalised.
    activation: str = "silu"
    rope_base: float | None = None  # q and k are rotated as in softmax, with this base; None: they are not
    spread: bool = False  # forget gates have biases, at first such that slots forget within 1 to 4,000 tokens
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses


ACTIVATIONS = ("silu", "none")


class GatedSlotState(NamedTuple):
    """What generation keeps: the slots' keys and values."""

    keys: Tensor  # A [B, H, K, M]
    values: Tensor  # C [B, H, M, V]
    position: int  # tokens so far


class GatedSlotMixer(StatefulMixer):
    """``y = W_o norm(silu(o))`` with, for each head and a_t = sigmoid(W_a x_t)^(1 / damping) in [0, 1]^M,

        A_t = A_{t-1} diag(a_t) + k_t (1 - a_t)^T,  C_t = diag(a_t) C_{t-1} + (1 - a_t) v_t^T,
        o_t = softmax(q_t A_t) C_t.

    "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", equations 7 to 10 and section 3.3: what a slot
    holds is a running average of keys and of values; q, k and v pass through SiLU. Time and memory per token do not
    grow with the sequence.

    A trained softmax layer becomes one with ``activation: none`` and its own heads (section 4.3 does so with 7B
    weights): q, k, v and the output projection stay, and queries find averages of keys where there were keys.
    """

    name: ClassVar[str] = "gsa"
    Config: ClassVar[type[GatedSlotConfig]] = GatedSlotConfig
    takes_from: ClassVar[Mapping[str, Takes]] = dict.fromkeys(("softmax", "sliding_window"), Takes(PROJECTIONS, HEADS))

    @classmethod
    def check(cls, config: GatedSlotConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_grouped_heads(config, place)
        check_choice("activation", config.activation, ACTIVATIONS)
        if config.rope_base is not None:
            check_rotation(config.key_width(place.width), config.rope_base)
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
        self.heads, self.groups, self.slots = config.heads, config.groups, config.slots
        self.key_width, self.damping, self.rope_base = config.key_width(place.width), config.damping, config.rope_base
        inner = self.heads * self.key_width
        self.qkv = nn.Linear(place.width, inner + 2 * self.groups * self.key_width, bias=False)
        self.forget = nn.Linear(place.width, self.heads * self.slots, bias=config.spread)
        if config.spread:
            self.forget.bias = nn.Parameter(_spread(self.slots, config.damping).repeat(self.heads))
        # Without an activation everything is as a softmax layer has it.
        self.norm = RMSNorm(inner, eps=1e-6) if config.activation == "silu" else None
        self.out = nn.Linear(inner, place.width, bias=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> GatedSlotState:
        keys = torch.zeros(batch, self.heads, self.key_width, self.slots, device=device, dtype=state_dtype(dtype))
        return GatedSlotState(keys, keys.transpose(2, 3).clone(), 0)

    def scan(
        self, x: Tensor, shard: SequenceShard, state: GatedSlotState | None
    ) -> tuple[Tensor, GatedSlotState | None]:
        projected = self.qkv(x)
        heads = (projected if self.norm is None else F.silu(projected)).unflatten(-1, (-1, self.key_width))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        if self.rope_base is not None:
            where = positions(shard, x.device, state)
            q, k = (rotate(z, where, base=self.rope_base) for z in (q, k))
        forget = self.forget(x)
        log_decay = F.logsigmoid(forget.to(state_dtype(forget.dtype))) / self.damping
        log_decay = log_decay.unflatten(-1, (self.heads, self.slots))
        # 1 - exp(x), which keeps its digits where next to nothing is written.
        write = -torch.expm1(log_decay)
        o, after = scan_slot_attention(
            q,
            k,
            v.repeat_interleave(self.heads // self.groups, 2),
            write,
            log_decay,
            shard,
            None if state is None else (state.keys, state.values),
            scale=None if self.norm is None else 1.0,
            strategy=self.strategy,
        )
        y = self.out(o.flatten(2) if self.norm is None else self.norm(F.silu(o).flatten(2)))
        if state is None or after is None:
            return y, None
        return y, GatedSlotState(*after, state.position + x.shape[1])


def _spread(slots: int, damping: float) -> Tensor:
    """Biases ``[M]`` with which slots, where nothing is said about a token, forget within 1.1 to 4,000 tokens."""
    lives = torch.logspace(math.log10(1.1), math.log10(4000.0), slots)
    kept = damping * torch.log1p(-1 / lives)  # log sigmoid(bias)
    return kept - torch.log(-torch.expm1(kept))
