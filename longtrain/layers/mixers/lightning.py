"""Lightning attention: linear attention with a fixed decay per head, gated output and its own norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.layers.mixers.base import (
    Boundaries,
    LayerPlace,
    StatefulMixer,
    check_choice,
    check_heads,
    check_scan_strategy,
)
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import MemoryState, positions, scan_linear_attention
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class LightningConfig:
    """Options of the lightning mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K and V; None: width / heads
    decay: str = "depth"  # slopes by head, and by depth l of L: "depth" 1 - l/L; "minimax" 1 - l/(L-1); "heads" 1
    norm: str = "head"  # RMS of each "head", of all heads "joint"ly, or jointly with a "learned" weight per channel
    gate: str = "sigmoid"  # what the gate's projection passes through: "sigmoid" or "linear"
    lrpe: str = "none"  # learned rotations of q and k (LRPE): in layer "none", the "first", or "all"
    value_silu: bool = False  # v passes through SiLU too
    scale: float | None = None  # multiplies q; None: K ** -0.5. The papers have none (1): the norm takes it out again
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width

    def has_lrpe(self, place: LayerPlace) -> bool:
        return self.lrpe == "all" or (self.lrpe == "first" and place.index == 0)


CHOICES = {
    "decay": ("depth", "minimax", "heads"),
    "norm": ("head", "joint", "learned"),
    "gate": ("sigmoid", "linear"),
    "lrpe": ("none", "first", "all"),
}
"""The texts that an option may be."""


def head_log_decays(heads: int, place: LayerPlace, decay: str = "depth") -> Tensor:
    """Log-decay of each head, ``[H]`` float32, all below 0: from short memory to long, longer in deeper layers.

    ``-2^(-8 h / H) * (1 - l / L)`` for h = 1 ... H and layer l = 0 ... L-1 of L: the slopes of "Train Short, Test Long"
    (as in the authors' code), scaled by depth as in "Scaling TransNormer to 175 Billion Parameters", section 3.1.2.
    decay "minimax": ``1 - l / (L - 1 + 1e-5) + 1e-5`` in its place (MiniMax-01); "heads": 1.
    """
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    factors = {
        "depth": 1 - place.index / place.depth,
        "minimax": 1 - place.index / (place.depth - 1 + 1e-5) + 1e-5,
        "heads": 1.0,
    }
    return (-(2.0 ** (-8 * head / heads)) * factors[decay]).float()


class LightningMixer(StatefulMixer):
    """``y = W_o (norm(o) * sigmoid(W_g x))`` with ``S_t = lambda S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``.

    q and k pass through SiLU and are not rotated: the decay carries position. "Scaling TransNormer to 175 Billion
    Parameters" (gated linear attention with its own simple RMS norm, equations 4 to 6) and "Various Lengths, Constant
    Speed: Efficient Language Modeling with Lightning Attention" (equations 3 to 8). Time and memory per token do not
    grow with the sequence.

    By default the norm is per head, because the sums of a head that forgets slowly are far larger than those of one
    that forgets fast. TransNormerLLM as published is ``norm: joint, gate: linear, lrpe: first, scale: 1``. LRPE turns
    channel d of head h at position t by a learned angle ``theta_hd t``, and takes the real part: each channel becomes
    ``x cos(theta t), x sin(theta t)``, so that ``q_s`` and ``k_t`` meet as ``q k cos(theta (s - t))`` (section 3.1.1;
    "Linearized Relative Positional Encoding"). MiniMax-01 ("Scaling Foundation Models with Lightning Attention") is
    ``decay: minimax, norm: learned, value_silu: true, scale: 1``.
    """

    name: ClassVar[str] = "lightning"
    Config: ClassVar[type[LightningConfig]] = LightningConfig
    log_decay: Tensor

    @classmethod
    def check(cls, config: LightningConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_heads(config.heads, config.head_width, place)
        for option, choices in CHOICES.items():
            check_choice(option, getattr(config, option), choices)
        if config.scale is not None and not 0 < config.scale < float("inf"):
            raise ValueError(f"scale: got {config.scale}, it must be above 0 (null: 1 / sqrt(head width))")

    @classmethod
    def mixing_flops(cls, config: LightningConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        width = config.key_width(place.width)
        return 4.0 * config.heads * width * width * (2 if config.has_lrpe(place) else 1)

    def __init__(self, config: LightningConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.options = config
        self.key_width = config.key_width(place.width)
        inner = config.heads * self.key_width
        self.scale = self.key_width**-0.5 if config.scale is None else config.scale
        self.qkvg = nn.Linear(place.width, 4 * inner, bias=False)
        self.out = nn.Linear(inner, place.width, bias=False)
        norms = {"head": self.key_width, "joint": inner, "learned": inner}
        self.norm = RMSNorm(norms[config.norm], eps=1e-6, elementwise_affine=config.norm == "learned")
        # 10000^(-2 d / (H K)) for the d-th of all channels, as in the authors' code
        theta = 10_000 ** (-2 / inner * torch.arange(inner, dtype=torch.float64)).float()
        self.theta = nn.Parameter(theta) if config.has_lrpe(place) else None
        self.register_buffer("log_decay", head_log_decays(config.heads, place, config.decay), persistent=False)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MemoryState:
        keys = self.key_width if self.theta is None else 2 * self.key_width
        return MemoryState.empty((batch, len(self.log_decay), keys, self.key_width), device, dtype)

    def scan(self, x: Tensor, shard: SequenceShard, state: MemoryState | None) -> tuple[Tensor, MemoryState | None]:
        inner = self.out.in_features
        qk, v, gate = self.qkvg(x).split((2 * inner, inner, inner), dim=-1)
        q, k = F.silu(qk).chunk(2, dim=-1)
        q, k, v = (z.unflatten(-1, (-1, self.key_width)) for z in (q, k, F.silu(v) if self.options.value_silu else v))
        if self.theta is not None:
            at = positions(shard, x.device, state)
            q, k = linear_rotation(q, self.theta, at), linear_rotation(k, self.theta, at)
        before = None if state is None else state.memory
        o, memory = scan_linear_attention(
            q, k, v, self.log_decay, shard, before, scale=self.scale, strategy=self.strategy
        )
        o = self.norm(o).flatten(2) if self.options.norm == "head" else self.norm(o.flatten(2))
        gate = torch.sigmoid(gate) if self.options.gate == "sigmoid" else gate
        return self.out(o * gate), None if state is None else state.after(x.shape[1], memory)


def linear_rotation(x: Tensor, theta: Tensor, at: Tensor) -> Tensor:
    """LRPE: x ``[B, T_w, H, K]``, theta ``[H K]``, positions ``[T_w]`` -> ``[B, T_w, H, 2 K]``, cosines first."""
    # In float64: at position 1,000,000 a float32 product is already off by 0.06 radians.
    angles = at.to(torch.float64)[:, None, None] * theta.double().view(x.shape[2:])
    return torch.cat((x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)), dim=-1)
