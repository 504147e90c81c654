"""Hymba: attention heads and state space heads side by side on one projected input."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels import causal_conv1d, linear_attention, softmax_attention
from longtrain.layers.attention import with_keys
from longtrain.layers.cache import KeyValueCache
from longtrain.layers.mixers.base import (
    ONE_TOKEN,
    Boundaries,
    LayerPlace,
    Mixer,
    Shared,
    SharingMixer,
    check_choice,
    check_divides,
    check_prompt,
    check_scan_ranks,
    long_home,
)
from longtrain.layers.mixers.heads import RotaryHeads, check_rotary_heads
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import scan_linear_attention
from longtrain.layers.rotary import rotate
from longtrain.layers.selective import SelectiveDecay
from longtrain.layers.short_convolution import ShortConvolution, check_conv_width, first_tokens
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.attention.choice import STRATEGIES, check_strategy
from longtrain.parallel.linear.calls import STRATEGIES as SCAN_STRATEGIES


@dataclass(frozen=True)
class HymbaConfig(RotaryHeads):
    """Options of the hymba mixer. heads are attention's; head_width is that of queries and keys, not of values."""

    window: int | None = 1023  # tokens to the left that a query sees besides itself and meta tokens; None: all
    # Attend to the keys and values of the layer before, a hymba layer with the same heads and window.
    share_kv: bool = False
    expand: int = 2  # values of all heads together, and the state space's channels, are so many times the model's width
    ssm_heads: int | None = None  # heads of the state space; None: as many as heads
    state_width: int = 16  # N: numbers that each channel keeps
    conv_width: int | None = 4  # tokens that the short convolution of x, B and C sees; None: no convolution
    strategy: str = "auto"  # how keys and values reach the queries (sequence_parallel_attention)
    scan_strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    @property
    def recurrent_heads(self) -> int:
        return self.heads if self.ssm_heads is None else self.ssm_heads


class HymbaState(NamedTuple):
    """What generation keeps: keys and values, none where they are those of the layer before, and the state space's."""

    cache: KeyValueCache
    meta_keys: Tensor  # [B, M, G, K], rotated
    meta_values: Tensor  # [B, M, G, V]
    inputs: Tensor  # of the convolution, the last width - 1 [B, width - 1, C]
    memory: Tensor  # [B, H_s, N, P], float32 (float64 for a float64 model)
    position: int  # tokens so far, meta tokens not counted


class _Parts(NamedTuple):
    """What the input projection gives, by use."""

    q: Tensor  # [B, T, H, K], rotated
    shared: Shared  # keys, rotated, [B, T, G, K] and values [B, T, G, V]
    gate: Tensor  # [B, T, inner]
    convolving: Tensor  # x, B and C [B, T, inner + 2 N]
    step: Tensor  # [B, T, H_s]


class HymbaMixer(SharingMixer):
    """``y = W_o (norm_1(attention) + norm_2(ssm)) / 2``, both from one projection of the input.

    "Hymba: A Hybrid-head Architecture for Small Language Models", section 2.1, equations 1 to 4: attention heads and
    state space heads read the same input side by side; their outputs, equally wide, pass through RMS norms with a
    learned scale per channel (beta_1, beta_2), are averaged, and share one output projection.

    - attention: rotary positions, grouped heads, values ``expand`` times as wide as keys. Section 2.2: a window in all
      but the first, middle and last layer (a pattern of two names), and ``share_kv``: keys and values of the layer
      before, so that this one projects queries only and generation keeps them once.
    - ssm: ``S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t B_t x_t^T, o_t = (C_t S_t + D x_t) * silu(z_t)`` with x, B and C
      convolved over a few tokens and passed through SiLU. The authors' heads are Mamba's, with a decay per channel and
      state; here they are Mamba2's (see mamba2), with one per head, as all of this project's state space layers.
    - meta tokens (section 2.3; ``model.meta_tokens``): learned tokens before every document. All queries see their
      keys, whatever the window; every document's state starts as they leave it, and so does its convolution.

    Meta tokens never see the text, so every rank carries them along by itself. With S_M the state after them, a token's
    is ``S_t + a_1 ... a_t S_M``: the product comes from a second, very narrow scan.
    """

    name: ClassVar[str] = "hymba"
    Config: ClassVar[type[HymbaConfig]] = HymbaConfig
    takes_meta: ClassVar[bool] = True

    # ---- what a recipe asks for -------------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: HymbaConfig, place: LayerPlace) -> None:
        check_choice("strategy", config.strategy, STRATEGIES)
        check_choice("scan_strategy", config.scan_strategy, SCAN_STRATEGIES)
        check_rotary_heads(config, place)
        for option in ("expand", "state_width"):
            if getattr(config, option) < 1:
                raise ValueError(f"{option}: got {getattr(config, option)}, it must be at least 1")
        inner = config.expand * place.width
        check_divides("heads", config.heads, "expand * model.width", inner)
        check_divides("ssm_heads", config.recurrent_heads, "expand * model.width", inner)
        if config.window is not None and config.window < 0:
            raise ValueError(f"window: got {config.window}, it must be 0 or more (null: no window)")
        check_conv_width(config.conv_width)

    @classmethod
    def check_ranks(cls, config: HymbaConfig, *, strategy: str, ranks: int, rows: int) -> None:
        own = strategy if config.strategy == "auto" else config.strategy
        check_strategy(own, None, heads=config.heads, ranks=ranks, rows=rows)
        try:
            check_scan_ranks(config.scan_strategy, heads=config.recurrent_heads, ranks=ranks, rows=rows)
        except ValueError as error:
            raise ValueError(f"scan_{error}") from None

    @classmethod
    def takes_shared(cls, config: HymbaConfig) -> bool:
        return config.share_kv

    @classmethod
    def check_before(cls, config: HymbaConfig, before: tuple[type[Mixer], Any] | None) -> None:
        if before is None:
            raise ValueError(
                "share_kv: got true in the first layer, before which there is none; false would work there"
            )
        mixer, options = before
        if mixer is not cls:
            raise ValueError(f"share_kv: got true behind a {mixer.name} layer, expected a hymba layer")
        for option in ("heads", "groups", "head_width", "expand", "window", "rope_base"):
            own, other = getattr(config, option), getattr(options, option)
            if own != other:
                name = "kv_heads" if option == "groups" else option
                own, other = ("null" if value is None else value for value in (own, other))
                raise ValueError(
                    f"{name}: got {own} with share_kv, which takes the keys and values of the layer before: its "
                    f"{other} would work"
                )

    # ---- what it costs ----------------------------------------------------------------------------------------------

    @classmethod
    def mixing_flops(cls, config: HymbaConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """2 H (K + V) for each key that a query sees, and 4 N for each channel of the state space.

        Meta tokens' keys and their state, 2 N more, are counted where tokens read them; their own way through the
        layers, a few tokens on each rank, is not.
        """
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        span = lengths if config.window is None else np.minimum(lengths, config.window + 1)
        pairs = float((span * (span + 1) / 2 + (lengths - span) * span).sum()) / max(lengths.sum(), 1) + place.meta
        inner = config.expand * place.width
        attention = 2.0 * pairs * (config.heads * config.key_width(place.width) + inner)
        return attention + (6.0 if place.meta else 4.0) * config.state_width * inner

    # ---- training ---------------------------------------------------------------------------------------------------

    def __init__(self, config: HymbaConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.groups, self.key_width = config.heads, config.groups, config.key_width(place.width)
        self.inner, self.meta, self.window = config.expand * place.width, place.meta, config.window
        self.value_width, self.share_kv, self.rope_base = self.inner // self.heads, config.share_kv, config.rope_base
        self.strategy, self.scan_strategy = config.strategy, config.scan_strategy
        self.recurrent_heads, self.state_width = config.recurrent_heads, config.state_width
        keys = 0 if self.share_kv else self.groups
        convolved = self.inner + 2 * self.state_width
        self.sizes = (
            self.heads * self.key_width,  # q
            keys * self.key_width,
            keys * self.value_width,
            self.inner,  # z
            convolved,  # x, B and C
            self.recurrent_heads,  # dt
        )
        self.inputs = nn.Linear(place.width, sum(self.sizes), bias=False)
        self.convolution = ShortConvolution(convolved, config.conv_width, bias=True)
        self.decay = SelectiveDecay(self.recurrent_heads)
        self.skip = nn.Parameter(torch.ones(self.recurrent_heads))  # D
        self.attention_norm, self.ssm_norm = (RMSNorm(self.inner, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(self.inner, place.width, bias=False)

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        if self.meta and self.convolution.width is not None:
            first_tokens(long_home(shard), self.convolution.width - 1)

    def mix_shared(self, x: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        home = long_home(shard)
        if home is not shard:
            x = self._behind_meta(x, shard.relayout(x[:, self.meta :], home, dim=1))
        parts = self._project(x, home.document_positions_on(x.device), 0, shared)
        y = self._close(self._attend(parts.q, parts.shared, home), self._recur(parts, home))
        if home is not shard:
            y = self._behind_meta(y, home.relayout(y[:, self.meta :], shard, dim=1))
        return y, parts.shared

    def _behind_meta(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The meta tokens of x and then the tokens."""
        return torch.cat((x[:, : self.meta], tokens), 1) if self.meta else tokens

    def _project(self, x: Tensor, where: Tensor, before: int, shared: Shared) -> _Parts:
        """where: the tokens' positions, of which so many more lie before; meta tokens, if x has any, come first."""
        first = x.shape[1] - len(where)
        where = where + (before + self.meta)
        if first:
            where = torch.cat((torch.arange(first, device=x.device), where))
        q, k, v, gate, convolving, step = self.inputs(x).split(self.sizes, dim=-1)
        q = rotate(q.unflatten(-1, (self.heads, self.key_width)), where, base=self.rope_base)
        if not self.share_kv:
            k = rotate(k.unflatten(-1, (self.groups, self.key_width)), where, base=self.rope_base)
            shared = k, v.unflatten(-1, (self.groups, self.value_width))
        elif not shared:
            raise ValueError("shared: got nothing, a layer with share_kv needs the keys and values of the layer before")
        return _Parts(q, shared, gate, convolving, step)

    def _attend(self, q: Tensor, shared: Shared, shard: SequenceShard) -> Tensor:
        """``[B, M + T_w, H, V]``: the window's softmax, with the meta tokens' keys among its own."""
        (k, v), meta = shared, self.meta
        window = None if self.window is None else (self.window, 0)
        near, lse = sequence_parallel_attention(
            q[:, meta:], k[:, meta:], v[:, meta:], shard, window=window, strategy=self.strategy
        )
        if not meta:
            return near
        return self._joined(q, near, lse, k[:, :meta], v[:, :meta])

    def _joined(self, q: Tensor, near: Tensor, lse: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The meta tokens' attention, if q has them, and near ``[B, T, H, V]`` with meta keys and values added."""
        first = q.shape[1] - near.shape[1]
        kept, weight = softmax_attention(q[:, first:], k, v, causal=False)
        assert weight is not None
        near = with_keys(near, lse, kept, weight)
        return torch.cat((softmax_attention(q[:, :first], k, v)[0], near), 1) if first else near

    def _recur(self, parts: _Parts, shard: SequenceShard) -> Tensor:
        """The state space's gated output ``[B, M + T_w, inner]``; every document starts where the meta tokens end."""
        meta, convolution = self.meta, self.convolution
        if not meta:
            convolved, _ = convolution(parts.convolving, shard, None)
            query, key, value, weighted, log_decay = self._recurrence(convolved, parts.step)
            o, _ = self._scan(query, key, weighted, log_decay, shard, None)
            return self._gated(o, value, parts.gate)
        first, tokens = parts.convolving[:, :meta], parts.convolving[:, meta:]
        convolved = torch.cat((self._convolved_alone(first), convolution.after(tokens, first, shard)), 1)
        query, key, value, weighted, log_decay = self._recurrence(convolved, parts.step)
        given = (query, key, weighted, log_decay)
        opening, state = linear_attention(*(x[:, :meta] for x in given), scale=1.0, return_state=True)
        assert state is not None
        query, key, weighted, log_decay = (x[:, meta:] for x in given)
        o, _ = self._scan(query, key, weighted, log_decay, shard, None)
        left = self._left(log_decay, shard)
        o = o + (left * (query[:, :, 0] @ state.to(query.dtype).transpose(1, 2).flatten(2)).view_as(o)).to(o.dtype)
        return self._gated(torch.cat((opening, o), 1), value, parts.gate)

    def _convolved_alone(self, first: Tensor) -> Tensor:
        """The meta tokens' inputs convolved, ``[B, M, C]``: nothing comes before them."""
        weight, bias = self.convolution.weight, self.convolution.bias
        return F.silu(first) if weight is None else causal_conv1d(first, weight[:, 0], bias, activation="silu")

    def _left(self, log_decay: Tensor, shard: SequenceShard) -> Tensor:
        """What is left at each token of what its document started with, ``[B, T_w, H_s, 1]``: the decays' product.

        A state of one number: the first token writes its own decay, and none writes after it.
        """
        begins = (shard.document_positions_on(log_decay.device) == 0)[:, None]
        ones = log_decay.new_ones(*log_decay.shape[:2], 1, 1)
        left, _ = self._scan(ones, ones, (log_decay.exp() * begins)[..., None], log_decay, shard, None)
        return left

    def _recurrence(self, convolved: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Query C and key B ``[B, T, 1, N]``, x and dt x ``[B, T, H_s, P]``, log_decay ``[B, T, H_s]``."""
        value, key, query = convolved.split((self.inner, self.state_width, self.state_width), dim=-1)
        value = value.unflatten(-1, (self.recurrent_heads, -1))
        dt, log_decay = self.decay(step)
        return query[:, :, None], key[:, :, None], value, (value * dt[..., None]).to(value.dtype), log_decay

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, shard: SequenceShard, state: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return scan_linear_attention(q, k, v, log_decay, shard, state, scale=1.0, strategy=self.scan_strategy)

    def _gated(self, o: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return (o + self.skip[:, None] * value).flatten(2) * F.silu(gate)

    def _close(self, attended: Tensor, recurred: Tensor) -> Tensor:
        return self.out((self.attention_norm(attended.flatten(2)) + self.ssm_norm(recurred)) / 2)

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "growing" if self.window is None and not self.share_kv else "constant"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> HymbaState:
        """The state before the first token; in a model with meta tokens, before these: zeros stand in their place."""
        size = 0 if self.share_kv else 64 if self.window is None else self.window + 1
        widths, like = (self.key_width, self.value_width), {"device": device, "dtype": dtype}
        keys, values = (torch.zeros(batch, size, self.groups, width, **like) for width in widths)
        first = 0 if self.share_kv else self.meta
        meta_keys, meta_values = (torch.zeros(batch, first, self.groups, width, **like) for width in widths)
        shape = (batch, self.recurrent_heads, self.state_width, self.inner // self.recurrent_heads)
        inputs, memory = self.convolution.empty_state(shape, device, dtype)
        return HymbaState(KeyValueCache(keys, values, 0), meta_keys, meta_values, inputs, memory, 0)

    @torch.no_grad()  # keys and values are written in place
    def prefill_shared(
        self, x: Tensor, shard: SequenceShard, state: HymbaState | None, shared: Shared
    ) -> tuple[Tensor, HymbaState, Shared]:
        check_prompt(shard)
        meta = self.meta if state is None else 0
        before = 0 if state is None else state.position
        parts = self._project(x, shard.document_positions_on(x.device), before, shared)
        if state is None:
            state = self.empty_state(x.shape[0], x.device, parts.q.dtype)
        one = shard.length == 1
        if not self.share_kv:
            state, shared = self._remembered(state, parts.shared, meta, one=one)
        keys, values, *kept = shared
        tokens, window = parts.q[:, meta:], None if self.window is None else (self.window, 0)
        # What is held is what one token sees, in any order. Otherwise the last query stands on the last key.
        near, lse = softmax_attention(tokens, keys, values, causal=not one, window=None if one else window)
        assert lse is not None
        o = self._joined(parts.q, near, lse, *kept) if self.meta else near
        whole = SequenceShard(length=x.shape[1]) if meta else shard
        convolved, inputs = self.convolution(parts.convolving, whole, state.inputs)
        query, key, value, weighted, log_decay = self._recurrence(convolved, parts.step)
        r, memory = self._scan(query, key, weighted, log_decay, whole, state.memory)
        assert inputs is not None and memory is not None
        y = self._close(o, self._gated(r, value, parts.gate))
        return y, state._replace(inputs=inputs, memory=memory, position=before + shard.length), shared

    def _remembered(self, state: HymbaState, made: Shared, meta: int, *, one: bool) -> tuple[HymbaState, Shared]:
        """The state with new keys and values, the first ones of meta tokens, and what the tokens' queries see of it."""
        keys, values = (x[:, meta:] for x in made)
        seen: Shared = ()
        if not one:
            old = zip(state.cache.in_order(), (keys, values), strict=True)
            seen = tuple(torch.cat((before, new.to(before.dtype)), 1) for before, new in old)
        cache = state.cache.extended(keys, values, ring=self.window is not None)
        seen = seen or cache.held()  # one token sees what is held now, itself among it
        state = state._replace(cache=cache)
        if meta:  # copies: views would keep the whole prompt
            state = state._replace(meta_keys=made[0][:, :meta].clone(), meta_values=made[1][:, :meta].clone())
        return state, (*seen, state.meta_keys, state.meta_values)

    def step_shared(self, x: Tensor, state: HymbaState, shared: Shared) -> tuple[Tensor, HymbaState, Shared]:
        y, state, shared = self.prefill_shared(x[:, None], ONE_TOKEN, state, shared)
        return y[:, 0], state, shared
