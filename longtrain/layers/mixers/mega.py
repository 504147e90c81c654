"""Mega: a damped moving average of many rates feeds a gated attention of one head inside chunks."""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels import softmax_attention
from longtrain.layers.chunks import chunks_of
from longtrain.layers.gated_unit import GatedUnit
from longtrain.layers.mixers.base import ONE_TOKEN, Boundaries, LayerPlace, Mixer, check_prompt
from longtrain.layers.moving_average import DampedAverage
from longtrain.layers.rotary import rotate
from longtrain.parallel import SequenceShard

HEAD = 128  # values of one head are cut into parts that kernels take; the parts share the head's weights


@dataclass(frozen=True)
class MegaConfig:
    """Options of the mega mixer."""

    chunk: int = 128  # c, tokens that attention sees of each other; beyond them reaches the moving average
    rates: int = 16  # h, decays of the moving average for each channel
    query_width: int | None = None  # z; None: width / 4
    value_width: int | None = None  # v; None: twice the width
    rope_base: float = 10_000.0  # rotary wavelengths reach 2 pi times this many tokens

    def widths(self, width: int) -> tuple[int, int]:
        """z and v."""
        query = width // 4 if self.query_width is None else self.query_width
        return query, 2 * width if self.value_width is None else self.value_width


class MegaState(NamedTuple):
    """What generation keeps: the moving averages, and keys and values of the chunk under way."""

    averages: Tensor  # [B, D, h], float32 (float64 for a float64 model)
    keys: Tensor  # [B, c, z], rotated
    values: Tensor  # [B, c, v]
    position: int  # tokens so far


class MegaMixer(Mixer, GatedUnit):
    """A gated unit (`GatedUnit`) fed by a moving average ``x' = EMA(x)``, whose o is attention inside chunks.

    "Mega: Moving Average Equipped Gated Attention", section 3: a damped exponential moving average with h rates for
    each channel (equations 2 to 5, `DampedAverage`), then ``o = softmax(q k^T / sqrt(z)) v`` of one head inside chunks
    of c tokens (section 3.5), here with rotary positions, one of the two relative biases of the authors' code.

    What lies before a token's chunk reaches it through the moving average alone, which loses nothing at ranks' or
    chunks' edges. Over ranks it runs where every rank holds whole chunks.
    """

    name: ClassVar[str] = "mega"
    Config: ClassVar[type[MegaConfig]] = MegaConfig

    @classmethod
    def check(cls, config: MegaConfig, place: LayerPlace) -> None:
        query, value = config.widths(place.width)
        if query < 2 or query % 2:
            raise ValueError(f"query_width: got {query}, rotary positions need an even number from 2 on")
        if value < 1 or (value > HEAD and value % HEAD):
            raise ValueError(f"value_width: got {value}, expected 1 ... {HEAD} or a multiple of {HEAD}")
        for option in ("chunk", "rates"):
            if getattr(config, option) < 1:
                raise ValueError(f"{option}: got {getattr(config, option)}, it must be at least 1")
        if not config.rope_base > 1:
            raise ValueError(f"rope_base: got {config.rope_base}, it must be above 1")

    @classmethod
    def pieces(cls, config: MegaConfig) -> tuple[str, int]:
        return "chunk", config.chunk

    @classmethod
    def mixing_flops(cls, config: MegaConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """2 (z + v) for each pair that attention sees; the moving average as its recurrence, 4 h for each channel."""
        lengths = np.diff(np.asarray(cu_seqlens, dtype=np.float64))
        whole, rest = np.divmod(lengths, config.chunk)
        pairs = float((whole * config.chunk * (config.chunk + 1) / 2 + rest * (rest + 1) / 2).sum())
        query, value = config.widths(place.width)
        return 2.0 * (query + value) * pairs / max(lengths.sum(), 1) + 4.0 * config.rates * place.width

    def __init__(self, config: MegaConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        width, self.chunk, self.rope_base = place.width, config.chunk, config.rope_base
        self.average = DampedAverage(width, config.rates)
        self.make_unit(width, *config.widths(width))

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        chunks_of(shard, self.chunk)

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        chunks = chunks_of(shard, self.chunk)
        x = shard.relayout(x, chunks.home, dim=1)
        smooth = self.average(x, chunks)
        q, k, v, gates = self.open_unit(x, smooth)
        where = torch.arange(self.chunk, device=x.device)
        # Inside a chunk its cells are a sequence; those that are empty lie after all others, where no token sees them.
        q, k, v = (chunks.grid(z).flatten(0, 1) for z in (q, k, v))
        o = self._attend(self._turned(q, where), self._turned(k, where), v)
        o = chunks.tokens(o.unflatten(0, (x.shape[0], -1)))
        return chunks.home.relayout(self.close_unit(x, o, gates), shard, dim=1)

    def _turned(self, x: Tensor, where: Tensor) -> Tensor:
        """x ``[B, T, z]`` rotated by places in the chunk ``[T]``."""
        return rotate(x[:, :, None], where, base=self.rope_base)[:, :, 0]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q ``[N, t, z]``, k ``[N, s, z]``, v ``[N, s, v]`` -> ``[N, t, v]``; the last query stands on the last key."""
        parts = max(self.value_width // HEAD, 1)
        q, k = (z[:, :, None].expand(-1, -1, parts, -1) for z in (q, k))
        out, _ = softmax_attention(q, k, v.unflatten(-1, (parts, -1)), causal=True, return_lse=False)
        return out.flatten(2)

    # ---- generation -------------------------------------------------------------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "constant"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> MegaState:
        averages = self.average.empty_state(batch, device, dtype)
        keys = torch.zeros(batch, self.chunk, self.query_width, device=device, dtype=dtype)
        values = torch.zeros(batch, self.chunk, self.value_width, device=device, dtype=dtype)
        return MegaState(averages, keys, values, 0)

    @torch.no_grad()  # keys and values are written in place
    def prefill(self, x: Tensor, shard: SequenceShard, state: MegaState | None = None) -> tuple[Tensor, MegaState]:
        check_prompt(shard)
        state = self.empty_state(x.shape[0], x.device, x.dtype) if state is None else state
        smooth, averages = self.average.prefill(x, state.averages, chunk=self.chunk)
        q, k, v, gates = self.open_unit(x, smooth)
        where = (torch.arange(x.shape[1], device=x.device) + state.position) % self.chunk
        q, k = self._turned(q, where), self._turned(k, where)
        outputs, done = [], 0
        while done < x.shape[1]:  # a piece of a chunk at a time
            place = (state.position + done) % self.chunk
            count = min(self.chunk - place, x.shape[1] - done)
            state.keys[:, place : place + count] = k[:, done : done + count]
            state.values[:, place : place + count] = v[:, done : done + count]
            seen = (z[:, : place + count].to(q.dtype) for z in (state.keys, state.values))
            outputs.append(self._attend(q[:, done : done + count], *seen))
            done += count
        o = torch.cat(outputs, 1) if outputs else v
        return self.close_unit(x, o, gates), MegaState(averages, state.keys, state.values, state.position + done)

    def step(self, x: Tensor, state: MegaState) -> tuple[Tensor, MegaState]:
        y, state = self.prefill(x[:, None], ONE_TOKEN, state)
        return y[:, 0], state
