"""Softmax attention with rotary positions and grouped heads, the mixer of Llama-shaped models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.kernels import softmax_attention
from longtrain.layers.attention import SequenceParallelAttention
from longtrain.layers.cache import KeyValueCache
from longtrain.layers.mixers.base import ONE_TOKEN, Boundaries, LayerPlace, Mixer, check_prompt
from longtrain.layers.mixers.heads import RotaryHeads, check_rotary_heads
from longtrain.layers.norm import RMSNorm
from longtrain.layers.pamm import PammLinear
from longtrain.layers.rotary import rotate
from longtrain.layers.taking import HEADS, PROJECTIONS, Takes
from longtrain.parallel import SequenceShard
from longtrain.parallel.attention.choice import STRATEGIES, check_heads_at_once, check_strategy
from longtrain.parallel.attention.cost import Heads
from longtrain.parallel.attention.relaying import check_layout


@dataclass(frozen=True)
class SoftmaxConfig(RotaryHeads):
    """Options of the softmax mixer."""

    window: int | None = None  # tokens to the left that a query sees besides itself; None: all
    qk_norm: bool = False  # RMS-normalise each head of q and k, with learned weights, before they are rotated
    sinks: bool = False  # one learned logit per head joins the softmax's denominator
    # Tokens of the input that the q, k, v projection keeps for the gradient of its weights, at random, instead of all;
    # every other one counts as a multiple of one of these. None: all, exactly. Not with recompute, which keeps none.
    pamm: int | None = None
    softcap: float | None = None  # scores become softcap * tanh(score / softcap); None leaves them
    strategy: str = "auto"  # how keys and values reach the queries (sequence_parallel_attention)
    # Key/value heads that attention works on at a time, with their query heads: fewer take less memory and send more,
    # smaller messages. None: all, or what memory.attention_heads says.
    heads_at_once: int | None = None
    # Where attention runs. home: the sequence's own layout; another layout's name: q, k, v and the output move there
    # and back; auto: the cost model's choice between home and balanced.
    layout: str = "auto"


_OF_ITS_KIND = Takes(
    PROJECTIONS | {name: name for name in ("q_norm.weight", "k_norm.weight", "sinks")},
    HEADS | {"rope_base": "rope_base"},
)


class SoftmaxMixer(Mixer):
    """Causal softmax attention: ``y = W_o softmax(R(q) R(k)^T / sqrt(K)) v`` ("Attention Is All You Need", equation 1).

    R is the rotary embedding by the position inside the document. Keys and values may have fewer heads than queries
    ("GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"). Options: RMS norms of q
    and k ("Scaling Vision Transformers to 22 Billion Parameters", section 2, with the RMS norm per head of Qwen3);
    a window ("Longformer", section 3.1); sinks, a logit s_h per head in the denominator, ``exp(a_ij) / (exp(s_h) +
    sum_j exp(a_ij))`` (gpt-oss; "Efficient Streaming Language Models with Attention Sinks"); softcap (Gemma 2).

    Generation keeps keys and values: of all tokens, or with a window of the last window + 1.
    """

    name: ClassVar[str] = "softmax"
    Config: ClassVar[type[SoftmaxConfig]] = SoftmaxConfig
    takes_from: ClassVar[Mapping[str, Takes]] = dict.fromkeys(("softmax", "sliding_window"), _OF_ITS_KIND)

    @classmethod
    def check(cls, config: SoftmaxConfig, place: LayerPlace) -> None:
        check_rotary_heads(config, place)
        if config.window is not None and config.window < 0:
            raise ValueError(f"window: got {config.window}, it must be 0 or more (null: no window)")
        if config.softcap is not None and not config.softcap > 0:
            raise ValueError(f"softcap: got {config.softcap}, it must be above 0 (null: none)")
        if config.pamm is not None and config.pamm < 1:
            raise ValueError(f"pamm: got {config.pamm}, it must be 1 or more (null: all tokens are kept)")
        if config.strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {config.strategy!r}, expected one of {', '.join(STRATEGIES)}")
        check_layout(config.layout)
        check_heads_at_once(config.heads_at_once)

    @classmethod
    def check_ranks(cls, config: SoftmaxConfig, *, strategy: str, ranks: int, rows: int) -> None:
        own = strategy if config.strategy == "auto" else config.strategy
        check_strategy(own, None, heads=config.heads, ranks=ranks, rows=rows)

    @classmethod
    def mixing_flops(cls, config: SoftmaxConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """4 H K for each pair of a query and a key that it sees: its score, and its value's part."""
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        span = lengths if config.window is None else np.minimum(lengths, config.window + 1)
        pairs = float((span * (span + 1) / 2 + (lengths - span) * span).sum())
        return 4.0 * config.heads * config.key_width(place.width) * pairs / max(lengths.sum(), 1)

    def __init__(self, config: SoftmaxConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups = config.heads, config.groups
        self.key_width = config.key_width(place.width)
        self.rope_base = config.rope_base
        self.window = config.window
        outputs = (self.heads + 2 * self.groups) * self.key_width
        if config.pamm is None:
            self.qkv = nn.Linear(place.width, outputs, bias=False)
        else:
            self.qkv = PammLinear(place.width, outputs, kept=config.pamm, seed=place.index)
        self.q_norm, self.k_norm = (RMSNorm(self.key_width, eps=1e-6) if config.qk_norm else None for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(self.heads)) if config.sinks else None
        self.out = nn.Linear(self.heads * self.key_width, place.width, bias=False)
        window = None if config.window is None else (config.window, 0)
        self.attention = SequenceParallelAttention(
            causal=True,
            window=window,
            softcap=config.softcap,
            strategy=config.strategy,
            heads_at_once=config.heads_at_once,
            layout=config.layout,
        )

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        at_once = self.attention.heads_at_once
        sizes = Heads(1, self.heads, self.groups, self.key_width, self.key_width, dtype.itemsize, at_once)
        self.attention.prepare(shard, sizes, device=device)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        q, k, v = self._project(x, shard.document_positions_on(x.device))
        return self.out(self.attention(q, k, v, shard, sinks=self.sinks).flatten(2))

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, T_w, H, K]``, k and v ``[B, T_w, G, K]``; q and k normalised and rotated."""
        heads = self.qkv(x).unflatten(-1, (-1, self.key_width))
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, positions, base=self.rope_base), rotate(k, positions, base=self.rope_base), v

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "growing" if self.window is None else "constant"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> KeyValueCache:
        size = 64 if self.window is None else self.window + 1
        keys, values = torch.zeros(2, batch, size, self.groups, self.key_width, device=device, dtype=dtype)
        return KeyValueCache(keys, values, 0)

    @torch.no_grad()  # keys and values are written in place
    def prefill(
        self, x: Tensor, shard: SequenceShard, state: KeyValueCache | None = None
    ) -> tuple[Tensor, KeyValueCache]:
        check_prompt(shard)
        positions = shard.document_positions_on(x.device)
        if state is None:
            q, k, v = self._project(x, positions)
            state = self.empty_state(x.shape[0], x.device, k.dtype)
            o = self.attention(q, k, v, shard, sinks=self.sinks)
        else:
            q, k, v = self._project(x, positions + state.position)
            seen = zip(state.in_order(), (k, v), strict=True)
            keys, values = (torch.cat((old, new.to(old.dtype)), 1) for old, new in seen)
            # With more keys than queries the last query stands on the last key.
            o = self._attend(q, keys, values, causal=True)
        return self.out(o.flatten(2)), state.extended(k, v, ring=self.window is not None)

    @torch.no_grad()
    def step(self, x: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        positions = ONE_TOKEN.document_positions_on(x.device) + state.position
        q, k, v = self._project(x[:, None], positions)
        state = state.extended(k, v, ring=self.window is not None)
        # What is held is what this token sees, and the order of keys does not matter to a softmax.
        o = self._attend(q, *state.held(), causal=False)
        return self.out(o.flatten(2))[:, 0], state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        window = self.attention.window if causal else None
        softcap = self.attention.softcap
        out, _ = softmax_attention(q, k, v, causal=causal, window=window, softcap=softcap, sinks=self.sinks)
        return out
