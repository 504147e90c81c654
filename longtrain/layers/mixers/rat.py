"""RAT: a gated recurrence inside chunks of tokens, softmax attention across them."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.kernels import softmax_attention
from longtrain.layers.cache import KeyValueCache
from longtrain.layers.chunks import chunks_of
from longtrain.layers.mixers.base import ONE_TOKEN, Boundaries, LayerPlace, Mixer, check_heads, check_prompt
from longtrain.layers.recurrence import state_dtype
from longtrain.layers.rotary import rotate
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.attention.choice import STRATEGIES, check_strategy


@dataclass(frozen=True)
class RATConfig:
    """Options of the rat mixer."""

    heads: int = 8  # H
    head_width: int | None = None  # K and V; None: width / heads
    chunk: int = 16  # L, tokens that the recurrence runs over before it starts anew
    rope_base: float = 10_000.0  # rotary wavelengths reach 2 pi times this many chunks
    strategy: str = "auto"  # how chunks' keys and values reach the queries (sequence_parallel_attention)

    def key_width(self, width: int) -> int:
        return width // self.heads if self.head_width is None else self.head_width


class RATState(NamedTuple):
    """What generation keeps: the running means of the chunk under way, and one key and value per finished chunk."""

    running: Tensor  # [B, H, 2K], keys then values, float32 (float64 for a float64 model)
    finished: KeyValueCache  # of chunks instead of tokens
    position: int  # tokens so far


class RATMixer(Mixer):
    """``y_t = W_o (z_t * softmax([q_t R K_before, q_t k~_t]) [V_before; v~_t])``, running means of keys and values.

    "RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling", section 3: inside a chunk
    of L tokens ``v~_t = g_t v~_{t-1} + (1 - g_t) v_t``, channel by channel, with a gate ``g_t = sigmoid(W_g x_t)``, and
    the same for keys (with the same gate); it starts from 0 in each chunk. A query sees the last ``k~, v~`` of every
    chunk before its own, and its own token's: one softmax over both. ``z_t = sigmoid(W_z x_t)`` gates the output. q and
    k are shared by the heads, whose gates make them differ. R is the rotary embedding by the chunk's number.

    L = 1 is softmax attention over gated values; L as long as the sequence is a gated recurrence. Attention costs L
    times less, and so do the keys and values that generation keeps.

    Over ranks it runs where every rank holds whole chunks. There a chunk is a query with L tokens times H heads, whose
    keys are the chunks of its document before it.
    """

    name: ClassVar[str] = "rat"
    Config: ClassVar[type[RATConfig]] = RATConfig

    @classmethod
    def check(cls, config: RATConfig, place: LayerPlace) -> None:
        check_heads(config.heads, config.head_width, place)
        width = config.key_width(place.width)
        if width % 2:
            raise ValueError(f"head_width: got {width}, rotary positions need an even number from 2 on")
        if config.chunk < 1:
            raise ValueError(f"chunk: got {config.chunk}, it must be at least 1")
        if not config.rope_base > 1:
            raise ValueError(f"rope_base: got {config.rope_base}, it must be above 1")
        if config.strategy not in STRATEGIES:
            raise ValueError(f"strategy: got {config.strategy!r}, expected one of {', '.join(STRATEGIES)}")

    @classmethod
    def check_ranks(cls, config: RATConfig, *, strategy: str, ranks: int, rows: int) -> None:
        own = strategy if config.strategy == "auto" else config.strategy
        check_strategy(own, None, heads=config.heads, ranks=ranks, rows=rows)

    @classmethod
    def pieces(cls, config: RATConfig) -> tuple[str, int]:
        return "chunk", config.chunk

    @classmethod
    def mixing_flops(cls, config: RATConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """The recurrence's 4 K per head for keys and values, and 4 K for each pair of a token and a chunk it sees."""
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        whole, rest = np.divmod(lengths, config.chunk)
        # A token of chunk c sees c chunks before it and its own.
        seen = float((config.chunk * whole * (whole + 1) / 2 + rest * (whole + 1)).sum())
        each = 4.0 * config.heads * config.key_width(place.width)
        return each * (2 + seen / max(lengths.sum(), 1))

    def __init__(self, config: RATConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads, self.chunk, self.rope_base = config.heads, config.chunk, config.rope_base
        self.key_width = config.key_width(place.width)
        values = self.heads * self.key_width
        self.qkv = nn.Linear(place.width, 2 * self.key_width + values, bias=False)
        self.gates = nn.Linear(place.width, 2 * values)  # g, then z
        # Heads that forget within a token and heads that average over the whole chunk.
        rates = torch.linspace(1.0, max(self.chunk, 2), self.heads)
        with torch.no_grad():
            self.gates.bias.copy_(torch.cat((rates.log().repeat_interleave(self.key_width), torch.zeros(values))))
        self.out = nn.Linear(values, place.width, bias=False)
        self.strategy = config.strategy

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        chunks_of(shard, self.chunk)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        chunks = chunks_of(shard, self.chunk)
        q, inputs, keep, gate = self._project(shard.relayout(x, chunks.home, dim=1))
        q, numbers, last = chunks.grid(q), chunks.numbers.on(x.device), chunks.local_finished.on(x.device)
        running = self._recur(chunks.grid(inputs), chunks.grid(keep), None)
        keys, values = self._finished(running.index_select(1, last), numbers.index_select(0, last), q.dtype)
        far, lse = sequence_parallel_attention(
            self._as_heads(q, numbers), keys, values, chunks.chunks, key_shard=chunks.finished, strategy=self.strategy
        )
        y = self._close(chunks.tokens(self._joined(q, running, far, lse)), gate)
        return chunks.home.relayout(y, shard, dim=1)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q ``[B, T_w, K]``, keys then values ``[B, T_w, H, 2K]``, their gate ``[B, T_w, H, K]``, the output's."""
        width, values = self.key_width, self.heads * self.key_width
        q, k, v = self.qkv(x).split((width, width, values), dim=-1)
        keep, gate = self.gates(x).split((values, values), dim=-1)
        v = v.unflatten(-1, (self.heads, width))
        inputs = torch.cat((k[:, :, None].expand_as(v), v), -1)
        # Half precision is too coarse near 1, where a gate that keeps much lies.
        keep = torch.sigmoid(keep.to(state_dtype(keep.dtype))).unflatten(-1, (self.heads, width))
        return q, inputs, keep, gate

    def _recur(self, inputs: Tensor, keep: Tensor, start: Tensor | None) -> Tensor:
        """Running means ``[B, N, L, H, 2K]`` inside chunks; start ``[B, H, 2K]``: what the first chunk goes on from.

        A loop over the L tokens of a chunk, for all chunks at once.
        """
        keep = torch.cat((keep, keep), -1)
        added = (1 - keep) * inputs.to(keep.dtype)
        mean = torch.zeros_like(added[:, :, 0])
        if start is not None:
            mean = torch.cat((start[:, None], mean[:, 1:]), 1)
        means = []
        # Taken apart at once: the gradient of each token's slice alone would be as large as the whole.
        for keeps, adds in zip(keep.unbind(2), added.unbind(2), strict=True):
            mean = torch.addcmul(adds, keeps, mean)
            means.append(mean)
        return torch.stack(means, 2)

    def _finished(self, running: Tensor, numbers: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values ``[B, n, H, K]`` of chunks whose running means are ``[B, n, L, H, 2K]``."""
        keys, values = running[:, :, -1].to(dtype).chunk(2, -1)
        return rotate(keys, numbers, base=self.rope_base), values

    def _as_heads(self, q: Tensor, numbers: Tensor) -> Tensor:
        """q ``[B, N, L, K]``, rotated by the chunks' numbers, as a query of H L heads for each chunk."""
        turned = rotate(q, numbers, base=self.rope_base)
        return turned[:, :, None].expand(-1, -1, self.heads, -1, -1).flatten(2, 3)

    def _joined(self, q: Tensor, running: Tensor, far: Tensor, lse: Tensor) -> Tensor:
        """The softmax over chunks before (far ``[B, N, H L, K]``) and the token's own means, ``[B, N, L, H, K]``."""
        far = far.unflatten(2, (self.heads, -1)).transpose(2, 3)
        lse = lse.unflatten(2, (self.heads, -1)).transpose(2, 3)
        keys, values = running.chunk(2, -1)
        # The own key is turned by the same angle as the query, which no score sees.
        own = (q[:, :, :, None].to(keys.dtype) * keys).sum(-1) * self.key_width**-0.5
        share = torch.sigmoid(own - lse)[..., None]  # 1 where there is no chunk before: lse is -inf there
        return far + (share * (values - far)).to(far.dtype)

    def _close(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.out(torch.sigmoid(gate) * o.flatten(2))

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "growing"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> RATState:
        running = torch.zeros(batch, self.heads, 2 * self.key_width, device=device, dtype=state_dtype(dtype))
        keys, values = torch.zeros(2, batch, 4, self.heads, self.key_width, device=device, dtype=dtype)
        return RATState(running, KeyValueCache(keys, values, 0), 0)

    @torch.no_grad()  # keys and values are written in place
    def prefill(self, x: Tensor, shard: SequenceShard, state: RATState | None = None) -> tuple[Tensor, RATState]:
        check_prompt(shard)
        q, inputs, keep, gate = self._project(x)
        state = self.empty_state(x.shape[0], x.device, q.dtype) if state is None else state
        tokens, before = x.shape[1], state.position % self.chunk  # before: tokens of the chunk under way
        if not tokens:
            return self._close(inputs[..., : self.key_width].to(x.dtype), gate), state
        after = -(before + tokens) % self.chunk
        # Ahead of the first token cells keep the mean as it is; those behind the last are not looked at.
        q, inputs = (_in_cells(z, before, after, 0.0).unflatten(1, (-1, self.chunk)) for z in (q, inputs))
        running = self._recur(inputs, _in_cells(keep, before, after, 1.0).unflatten(1, (-1, self.chunk)), state.running)
        numbers = torch.arange(q.shape[1], device=x.device) + state.position // self.chunk
        keys, values = self._finished(running, numbers, q.dtype)
        seen = (
            torch.cat((a, b[:, :-1].to(a.dtype)), 1) for a, b in zip(state.finished.held(), (keys, values), strict=True)
        )
        # With as many chunks ahead of the first, the last query sees all keys, the one before one less.
        far, lse = softmax_attention(self._as_heads(q, numbers), *seen, causal=True)
        assert lse is not None
        o = self._joined(q, running, far, lse).flatten(1, 2)[:, before : before + tokens]
        whole = keys.shape[1] - (after > 0)
        cache = state.finished.extended(keys[:, :whole], values[:, :whole], ring=False)
        # A copy: a view would keep every token's.
        rest = running[:, -1, -1 - after].clone() if after else torch.zeros_like(state.running)
        return self._close(o, gate), RATState(rest, cache, state.position + tokens)

    def step(self, x: Tensor, state: RATState) -> tuple[Tensor, RATState]:
        y, state = self.prefill(x[:, None], ONE_TOKEN, state)
        return y[:, 0], state


def _in_cells(x: Tensor, before: int, after: int, value: float) -> Tensor:
    """x ``[B, T, ...]`` with so many cells of a value before and after."""
    ends = (x.new_full((x.shape[0], count, *x.shape[2:]), value) for count in (before, after))
    first, last = ends
    return torch.cat((first, x, last), 1)
