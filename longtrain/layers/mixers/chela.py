"""CHELA: short and long convolutions feed a gated linear attention."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from longtrain.layers.chunks import chunks_of
from longtrain.layers.gated_unit import GatedUnit
from longtrain.layers.long_convolution import ShortLongConvolution
from longtrain.layers.mixers.base import Boundaries, LayerPlace, StatefulMixer, check_divides, check_scan_strategy
from longtrain.layers.norm import RMSNorm
from longtrain.layers.recurrence import MemoryState, scan_linear_attention
from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class CHELAConfig:
    """Options of the chela mixer."""

    heads: int = 4  # H, among which queries, keys and values are divided
    query_width: int | None = None  # z; None: width / 2
    value_width: int | None = None  # v; None: twice the width
    short: int = 3  # taps of the short filter
    places: int = 16  # s, numbers of a piece of the long filter
    scales: int = 4  # n, its pieces: it has 2^(n - 1) s taps
    strategy: str = "auto"  # how states cross ranks: auto, allgather, alltoall, chain, ulysses

    def widths(self, width: int) -> tuple[int, int]:
        """z and v."""
        query = width // 2 if self.query_width is None else self.query_width
        return query, 2 * width if self.value_width is None else self.value_width

    @property
    def taps(self) -> int:
        return self.places * 2 ** (self.scales - 1)


class CHELAState(NamedTuple):
    """What generation keeps: the last inputs of the convolution, and the attention's memory."""

    inputs: Tensor  # [B, L, D]
    memory: MemoryState


class CHELAMixer(StatefulMixer, GatedUnit):
    """A gated unit (`GatedUnit`) fed by convolutions, whose o is linear attention: ``o_t = norm(q_t sum_s k_s v_s^T)``.

    "Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences" (CHELA), section 3:
    ``x' = silu((short + long) * x)`` (`ShortLongConvolution`) stands where Mega has its moving average, and causal
    linear attention over the whole document, here of H heads whose outputs an RMS norm keeps in bounds, where Mega
    attends inside chunks. No decay and no positions: the convolutions tell near from far.

    Time and memory per token do not grow with the sequence. Over ranks it runs where every rank holds whole pieces of
    as many tokens as the filter has taps, so that a rank needs one piece of the rank before.
    """

    name: ClassVar[str] = "chela"
    Config: ClassVar[type[CHELAConfig]] = CHELAConfig

    @classmethod
    def check(cls, config: CHELAConfig, place: LayerPlace) -> None:
        check_scan_strategy(config.strategy)
        if config.heads < 1:
            raise ValueError(f"heads: got {config.heads}, it must be at least 1")
        for option, width in zip(("query_width", "value_width"), config.widths(place.width), strict=True):
            if width < 1 or width % config.heads:
                if getattr(config, option) is None:
                    check_divides("heads", config.heads, f"{option}'s default", width, otherwise=f" (or give {option})")
                raise ValueError(f"{option}: got {width}, expected a multiple of heads = {config.heads} from there on")
        for option in ("short", "places", "scales"):
            if getattr(config, option) < 1:
                raise ValueError(f"{option}: got {getattr(config, option)}, it must be at least 1")
        if config.short > config.taps:
            raise ValueError(f"short: got {config.short}, longer than the long filter's {config.taps} taps")

    @classmethod
    def pieces(cls, config: CHELAConfig) -> tuple[str, int]:
        return "scales", config.taps

    @classmethod
    def mixing_flops(cls, config: CHELAConfig, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """4 z v / H for the memories, and 2 L for each channel that is convolved."""
        query, value = config.widths(place.width)
        return 4.0 * query * value / config.heads + 2.0 * config.taps * place.width

    def __init__(self, config: CHELAConfig, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.check(config, place)
        self.heads = config.heads
        self.convolution = ShortLongConvolution(
            place.width, short=config.short, places=config.places, scales=config.scales
        )
        self.make_unit(place.width, *config.widths(place.width))
        self.norm = RMSNorm(self.value_width // self.heads, eps=1e-6)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> CHELAState:
        shape = (batch, self.heads, self.query_width // self.heads, self.value_width // self.heads)
        inputs = self.convolution.empty_state(batch, device, dtype)
        return CHELAState(inputs, MemoryState.empty(shape, device, dtype))

    def scan(self, x: Tensor, shard: SequenceShard, state: CHELAState | None) -> tuple[Tensor, CHELAState | None]:
        if state is not None:
            smooth, inputs = self.convolution.prefill(x, state.inputs)
            y, memory = self._mix(x, smooth, shard, state.memory.memory)
            return y, CHELAState(inputs, state.memory.after(x.shape[1], memory))
        pieces = chunks_of(shard, self.convolution.taps)
        x = shard.relayout(x, pieces.home, dim=1)
        y, _ = self._mix(x, self.convolution(x, pieces), pieces.home, None)
        return pieces.home.relayout(y, shard, dim=1), None

    def _mix(
        self, x: Tensor, smooth: Tensor, shard: SequenceShard, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v, gates = self.open_unit(x, smooth)
        q, k, v = (z.unflatten(-1, (self.heads, -1)) for z in (q, k, v))
        o, memory = scan_linear_attention(q, k, v, None, shard, memory, strategy=self.strategy)
        return self.close_unit(x, self.norm(o).flatten(2), gates), memory
