"""What both passes of the gated delta rule on Triton do alike: tensors as kernels take them, launches, preparation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.kernels.gated_delta_rule import configs, triton_prepare, triton_states
from longtrain.kernels.launching import Config, launch

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Prepared:
    """What chunks are before any state is known; names as in `triton_prepare.py`."""

    rates: Tensor
    p: Tensor
    inverse: Tensor
    a: Tensor
    w: Tensor
    u: Tensor
    readers: Tensor  # Q exp(prefix) and K exp(suffix), or q and k themselves
    written: Tensor
    from_start: Tensor | None
    to_end: Tensor | None
    through: Tensor | None


class Call:
    """The tensors of a pass as the kernels take them, the tables of chunks and segments, and launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor | None,
        offsets: np.ndarray,
        *,
        scale: float,
    ) -> None:
        alike = q.dtype == k.dtype == v.dtype and q.dtype in _HALVES
        self.dtype = q.dtype if alike else torch.float32
        self.q, self.k, self.v = (x.to(self.dtype).contiguous() for x in (q, k, v))
        self.beta = beta.float().contiguous()
        self.log_decay = None if log_decay is None else log_decay.float().contiguous()
        self.gate = 0 if log_decay is None else log_decay.ndim - 2
        self.scale = scale
        batch, tokens, self.heads, self.value_width = v.shape
        self._grid = batch, len(offsets) - 1
        self.key_width = k.shape[3]
        self.rows = batch * tokens
        widths = {"key_width": self.key_width, "value_width": self.value_width}
        self.size = configs.chunk_size(q.device, self.dtype, **widths)
        chunks, segments = _tables(offsets, batch=batch, tokens=tokens, size=self.size)
        self.chunk_count, self.segment_count = len(chunks), len(segments)
        self.chunks, self.segments = (torch.from_numpy(x).to(q.device) for x in (chunks, segments))

    @cached_property
    def _common(self) -> dict[str, Any]:
        return {
            "H": self.heads,
            "GQ": self.q.shape[2],
            "GK": self.k.shape[2],
            "K": self.key_width,
            "V": self.value_width,
            "C": self.size,
            "LEVELS": self.size.bit_length() - 1,
            "GATE": self.gate,
            "PRECISION": "ieee",
            "BY_ROWS": configs.by_rows(self.dtype),
        }

    def launch(self, name: str, kernel: Any, grid: tuple[int, ...], *args: Any, values: int | None = None) -> None:
        """Run `kernel`, whose configuration goes by `name`; grid: -1 stands for blocks of V, -2 for blocks of K.

        values: takes the place of V.
        """
        constants = {key: x for key, x in self._common.items() if key in kernel.arg_names}
        width = self.value_width if values is None else values
        if "V" in constants:
            constants["V"] = width
        if self.gate == 2 and name in ("states", "outputs", "dstates"):  # q and k come with decays, for each head
            constants |= {key: self.heads for key in ("GQ", "GK") if key in constants}
        if name == "states":
            constants["IDENTITY"] = values is not None
        config = self.config(name, width)
        blocks = {-1: ("BV", width), -2: ("BK", self.key_width)}
        sizes = (-(-blocks[x][1] // int(config.constants[blocks[x][0]])) if x < 0 else x for x in grid)
        launch(kernel, tuple(sizes), *args, config=config, **constants)

    def config(self, name: str, values: int | None = None) -> Config:
        """The configuration of a kernel."""
        width = self.value_width if values is None else values
        return configs.config(name, self.q.device, self.dtype, key_width=self.key_width, value_width=width)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype of products unless said otherwise."""
        return self.v.new_empty(shape, dtype=dtype or self.dtype)

    def empty_states(self, *, of: int, dtype: torch.dtype = torch.float32, values: int | None = None) -> Tensor:
        """[of, H, K, V]."""
        return self.empty(of, self.heads, self.key_width, self.value_width if values is None else values, dtype=dtype)

    def prepare(self) -> Prepared:
        """Run the kernels pairs, invert and apply."""
        size, heads, width = self.size, self.heads, self.key_width
        p, inverse = (self.empty(self.rows, heads, size) for _ in range(2))
        rates, a = (self.empty(self.rows, heads, *last, dtype=torch.float32) for last in ((), (size,)))
        w, u = self.empty(self.rows, heads, width), self.empty(self.rows, heads, self.value_width)
        per_channel, per_head = self.gate == 2, self.gate == 1
        readers, written = (self.empty(self.rows, heads, width) if per_channel else None for _ in range(2))
        from_start, to_end = (self.empty(self.rows, heads, dtype=torch.float32) if per_head else None for _ in range(2))
        through = None
        if self.gate:
            through = self.empty(self.chunk_count, heads, *((width,) if per_channel else ()), dtype=torch.float32)
        self.launch(
            "pairs_channel" if per_channel else "pairs",
            triton_prepare.pairs_kernel,
            (self.chunk_count, heads),
            self.q,
            self.k,
            self.beta,
            self.log_decay,
            self.chunks,
            rates,
            a,
            p,
            readers,
            w if per_channel else None,
            written,
            from_start,
            to_end,
            through,
        )
        grid = (self.chunk_count, heads)
        self.launch("invert", triton_prepare.invert_kernel, grid, a, rates, self.chunks, inverse)
        self.launch(
            "apply",
            triton_prepare.apply_kernel,
            grid,
            None if per_channel else self.k,
            self.v,
            rates,
            from_start,
            inverse,
            self.chunks,
            w,
            u,
        )
        readers, written = self.q if readers is None else readers, self.k if written is None else written
        return Prepared(rates, p, inverse, a, w, u, readers, written, from_start, to_end, through)

    def carry(
        self,
        ready: Prepared,
        initial: Tensor | None,
        *,
        states: Tensor | None = None,
        final: Tensor | None = None,
        transition: bool = False,
    ) -> None:
        """Run the kernel states, which writes `states` (and turns U0 into U for them) and `final`.

        transition: `final` is [segments, H, K, K], what becomes of the identity where nothing new is stored.
        """
        self.launch(
            "states",
            triton_states.states_kernel,
            (self.segment_count * self.heads, -1),
            ready.written,
            ready.w,
            ready.to_end,
            ready.through,
            self.segments,
            initial,
            None if transition else ready.u,
            states,
            final,
            values=self.key_width if transition else None,
        )

    def by_segment(self, states: Tensor | None) -> Tensor | None:
        """[B, N, H, K, V] as [segments, H, K, V] in float32."""
        return None if states is None else states.float().contiguous().flatten(0, 1)

    def by_row(self, states: Tensor) -> Tensor:
        """[segments, H, K, V] as [B, N, H, K, V]."""
        return states.view(*self._grid, *states.shape[1:])


def _tables(offsets: np.ndarray, *, batch: int, tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [chunks, 2]: first row and tokens of each chunk; [segments, 3]: first row, tokens and first chunk."""
    lengths = np.tile(np.diff(offsets), batch)
    starts = (np.arange(batch)[:, None] * tokens + offsets[:-1]).reshape(-1)
    counts = -(-lengths // size)
    firsts = np.cumsum(counts) - counts
    number = np.arange(counts.sum()) - np.repeat(firsts, counts)  # of a chunk in its segment
    rows = np.repeat(starts, counts) + number * size
    chunks = np.stack((rows, np.minimum(np.repeat(lengths, counts) - number * size, size)), 1)
    return chunks.astype(np.int32), np.stack((starts, lengths, firsts), 1).astype(np.int32)
