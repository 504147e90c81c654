"""Lizard: gated linear attention for the far past, a softmax window with learned memory for the near."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels import softmax_attention
from longtrain.layers.attention import with_keys
from longtrain.layers.cache import KeyValueCache
from longtrain.layers.mixers.base import (
    ONE_TOKEN,
    Boundaries,
    LayerPlace,
    RecurrentMixer,
    check_prompt,
    check_scan_ranks,
    check_scan_strategy,
)
from longtrain.layers.mixers.heads import RotaryHeads, check_rotary_heads
from longtrain.layers.recurrence import MemoryState, positions, scan_linear_attention, state_dtype
from longtrain.layers.rotary import rotate
from longtrain.layers.taking import HEADS, PROJECTIONS, Takes
from longtrain.parallel import SequenceShard, sequence_parallel_attention


@dataclass(frozen=True)
class LizardConfig(RotaryHeads):
    """Options of the lizard mixer, whose heads are those of softmax, whose weights it takes."""

    window: int = 128  # tokens to the left that a query's softmax sees besides itself
    memory: int = 4  # M, learned keys and values per head that every query's softmax sees
    feature_width: int | None = None  # learned directions of a feature map, each used twice; None: K / 2
    gate_temperature: float = 16.0  # tau: the larger, the slower the far past is forgotten
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def features(self, width: int) -> int:
        """Directions of a feature map: half as many as it has outputs."""
        return max(self.key_width(width) // 2, 1) if self.feature_width is None else self.feature_width


class LizardState(NamedTuple):
    """What generation keeps: the window's keys and values, and the far past's memory."""

    window: KeyValueCache
    far: MemoryState


class LizardMixer(RecurrentMixer):
    """``y = W_o (near + far)``: a softmax over window and memory tokens, and gated linear attention over all before.

    "Lizard: An Efficient Linearization Framework for Large Language Models", section 4. far:
    ``phi(q_t) S_t / (phi(q_t) z_t)`` with ``S_t = g_t S_{t-1} + phi(k_t) v_t^T``, ``z_t = g_t z_{t-1} + phi(k_t)``, a
    gate per head and token, ``g_t = sigmoid(W_g x_t + b)^(1 / tau)``, and the feature map of "The Hedgehog & the
    Porcupine" (section 4.2), ``phi(x) = [softmax(W x), softmax(-W x)]``, learned per head for queries and keys. near:
    one softmax over the rotated keys of the window and over M learned keys, which stand at no position and are scored
    by the query as it was before it was rotated.

    q, k, v and the output projection are those of the softmax mixer, so that a trained softmax layer can become one.
    The far past carries no positions but its decay. Time and memory per token do not grow with the sequence.
    """

    name: ClassVar[str] = "lizard"
    Config: ClassVar[type[LizardConfig]] = LizardConfig
    takes_from: ClassVar[Mapping[str, Takes]] = dict.fromkeys(
        ("softmax", "sliding_window"), Takes(PROJECTIONS, HEADS | {"rope_base": "rope_base"})
    )

    @classmethod
    def check(cls, config: LizardConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        check_rotary_heads(config, place)
        for option, least in (("window", 0), ("memory", 0)):
            if getattr(config, option) < least:
                raise ValueError(f"{option}: got {getattr(config, option)}, it must be {least} or more")
        if config.feature_width is not None and config.feature_width < 1:
            raise ValueError(f"feature_width: got {config.feature_width}, it must be at least 1")
        if not 0 < config.gate_temperature < float("inf"):
            raise ValueError(f"gate_temperature: got {config.gate_temperature}, it must be above 0")

    @classmethod
    def check_ranks(cls, config: LizardConfig, *, strategy: str, ranks: int, rows: int) -> None:
        check_scan_ranks(config.strategy, heads=config.heads, ranks=ranks, rows=rows)

    @classmethod
    def mixing_flops(cls, config: LizardConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """4 H K for each pair that a softmax sees, and 4 H F (V + 1) for the far past."""
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        span = np.minimum(lengths, config.window + 1)
        pairs = float((span * (span + 1) / 2 + (lengths - span) * span).sum()) / max(lengths.sum(), 1)
        width, features = config.key_width(place.width), config.features(place.width)
        near = 4.0 * config.heads * width * (pairs + config.memory)
        return near + 4.0 * config.heads * 2 * features * (width + 1)

    def __init__(self, config: LizardConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups, self.key_width = config.heads, config.groups, config.key_width(place.width)
        self.rope_base, self.window, self.temperature = config.rope_base, config.window, config.gate_temperature
        self.strategy, self.features = config.strategy, config.features(place.width)
        self.qkv = nn.Linear(place.width, (self.heads + 2 * self.groups) * self.key_width, bias=False)
        self.decay = nn.Linear(place.width, self.heads)
        nn.init.zeros_(self.decay.bias)
        # Stacks of small matrices, one for each head.
        self.q_features, self.k_features = (
            nn.Parameter(torch.randn(heads, self.key_width, self.features) * self.key_width**-0.5)
            for heads in (self.heads, self.groups)
        )
        self.memory = (
            nn.Parameter(torch.randn(2, config.memory, self.groups, self.key_width)) if config.memory else None
        )
        self.out = nn.Linear(self.heads * self.key_width, place.width, bias=False)

    def mix(self, x: Tensor, shard: SequenceShard) -> Tensor:
        q, k, v = self._project(x)
        where = positions(shard, x.device, None)
        turned, keys = self._turned(q, where), self._turned(k, where)
        near, lse = sequence_parallel_attention(turned, keys, v, shard, window=(self.window, 0))
        far, _ = self._far(x, q, k, v, shard, None)
        return self._close(self._with_memory(q, near, lse), far)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, T_w, H, K]``, k and v ``[B, T_w, G, K]``."""
        heads = self.qkv(x).unflatten(-1, (-1, self.key_width))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        return q, k, v

    def _turned(self, x: Tensor, where: Tensor) -> Tensor:
        return rotate(x, where, base=self.rope_base)

    def _far(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The normalised linear attention ``[B, T_w, H, V]``, and its state ``[B, H, F, V + 1]`` after it."""
        logits = self.decay(x)
        log_decay = F.logsigmoid(logits.to(state_dtype(logits.dtype))) / self.temperature
        # The normaliser is one more value channel, which is always 1.
        values = torch.cat((v, torch.ones_like(v[..., :1])), -1).repeat_interleave(self.heads // self.groups, 2)
        o, state = scan_linear_attention(
            _feature_map(q, self.q_features),
            _feature_map(k, self.k_features),
            values,
            log_decay,
            shard,
            state,
            scale=1.0,
            strategy=self.strategy,
        )
        return o[..., :-1] / o[..., -1:], state

    def _with_memory(self, q: Tensor, near: Tensor, lse: Tensor) -> Tensor:
        """The window's softmax with the memory tokens' keys among its own."""
        if self.memory is None:
            return near
        learned = self.memory.to(q.dtype).view(2, 1, -1, self.groups, self.key_width)
        keys, values = learned.expand(-1, q.shape[0], -1, -1, -1)
        kept, weight = softmax_attention(q, keys, values, causal=False)
        assert weight is not None
        return with_keys(near, lse, kept, weight)

    def _close(self, near: Tensor, far: Tensor) -> Tensor:
        return self.out((near + far).flatten(2))

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "constant"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> LizardState:
        keys, values = torch.zeros(
            2, batch, self.window + 1, self.groups, self.key_width, device=device, dtype=dtype
        ).unbind()
        shape = (batch, self.heads, 2 * self.features, self.key_width + 1)
        return LizardState(KeyValueCache(keys.clone(), values.clone(), 0), MemoryState.empty(shape, device, dtype))

    @torch.no_grad()  # keys and values are written in place
    def prefill(self, x: Tensor, shard: SequenceShard, state: LizardState | None = None) -> tuple[Tensor, LizardState]:
        check_prompt(shard)
        q, k, v = self._project(x)
        state = self.empty_state(x.shape[0], x.device, k.dtype) if state is None else state
        where = positions(shard, x.device, state.far)
        turned, key = self._turned(q, where), self._turned(k, where)
        seen = zip(state.window.in_order(), (key, v), strict=True)
        keys, values = (torch.cat((old, new.to(old.dtype)), 1) for old, new in seen)
        # With more keys than queries the last query stands on the last key.
        near, lse = softmax_attention(turned, keys, values, window=(self.window, 0))
        assert lse is not None
        far, memory = self._far(x, q, k, v, shard, state.far.memory)
        y = self._close(self._with_memory(q, near, lse), far)
        return y, LizardState(state.window.extended(key, v, ring=True), state.far.after(x.shape[1], memory))

    def step(self, x: Tensor, state: LizardState) -> tuple[Tensor, LizardState]:
        y, state = self.prefill(x[:, None], ONE_TOKEN, state)
        return y[:, 0], state


def _feature_map(x: Tensor, weight: Tensor) -> Tensor:
    """x ``[B, T_w, H, K]``, weight ``[H, K, F]`` -> ``[B, T_w, H, 2 F]``, above 0: softmaxes of W x and of -W x."""
    projected = torch.einsum("bthk,hkf->bthf", x, weight.to(x.dtype))
    wide = projected.to(state_dtype(x.dtype))
    return torch.cat((torch.softmax(wide, -1), torch.softmax(-wide, -1)), -1).to(x.dtype)
