"""The causal convolution as a sum of shifted products, tile by tile of tokens, so that a tile stays in a CPU's cache.

With p_t the position of token t in its segment and w_k = weight[:, width - 1 - k], what stands k tokens back is

    x_{t-k}                            where p_t >= k,
    halo[width - 1 + p_t - k]          elsewhere: only for a segment's first width - 1 tokens, its edge.

    z_t = bias + sum_k w_k x_{t-k}         dx_t = sum_k w_k dz_{t+k} [p_{t+k} >= k]        dw_k = sum_t dz_t x_{t-k}

A product with a token that does not count is left out (never multiplied by 0), so no NaN crosses a boundary.
Backward keeps the inputs only.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers of a tile: on a CPU half a megabyte in float32; an accelerator wants few large calls instead.
_CPU_TILE, _DEVICE_TILE = 2**17, 2**26


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What sums are computed in: float64 if one of the tensors is, otherwise float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None,
    halo_counts: np.ndarray | None,
    activation: str | None,
) -> Tensor:
    """See `passes.convolve_forward`."""
    call = _Call(x, weight, bias, offsets, halo, halo_counts)
    out = x.new_empty(x.shape)
    for start, stop in call.tiles:
        z = call.sums(start, stop)
        out[:, start:stop] = F.silu(z) if activation else z
    return out


def backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: np.ndarray,
    *,
    halo: Tensor | None,
    halo_counts: np.ndarray | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `passes.convolve_backward`."""
    call = _Call(x, weight, bias, offsets, halo, halo_counts)
    dx = x.new_empty(x.shape)
    dtaps, dbias = torch.zeros_like(call.taps), torch.zeros_like(call.taps[0])
    dedge = call.taps.new_empty(x.shape[0], len(call.edge), x.shape[2])
    for start, stop in call.tiles:
        seen = min(stop + call.width - 1, x.shape[1])  # dz of the tokens that see this tile's
        dz = dout[:, start:seen].to(call.dtype)
        if activation:
            z = call.sums(start, seen)
            gate = z.sigmoid()
            dz = dz * gate * (1 + z * (1 - gate))
        dx[:, start:stop] = call.spread(dz, start, stop)
        dz = dz[:, : stop - start]
        dbias += dz.sum((0, 1))
        call.add_tap_gradients(dtaps, dz, start, stop)
        if call.halo is not None:
            part = call.edge_between(start, stop)
            dedge[:, part] = dz[:, call.edge[part] - start]
    dhalo = None
    if halo is not None:
        dhalo = call.edge_gradients(dtaps, dedge).to(halo.dtype)
    dweight = dtaps.flip(0).t().contiguous().to(weight.dtype)
    return dx, dweight, None if bias is None else dbias.to(bias.dtype), dhalo


@dataclass
class _Call:
    """One call's tensors, and its sums over tiles [start, stop) of tokens."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    offsets: np.ndarray
    halo: Tensor | None
    halo_counts: np.ndarray | None

    def __post_init__(self) -> None:
        self.dtype = state_dtype(self.x, self.weight, self.bias, self.halo)
        self.width = self.weight.shape[1]
        self.taps = self.weight.to(self.dtype).t().flip(0).contiguous()  # [width, D], w_k

    @property
    def tiles(self) -> list[tuple[int, int]]:
        batch, tokens, channels = self.x.shape
        budget = _CPU_TILE if self.x.device.type == "cpu" else _DEVICE_TILE
        size = max(budget // max(batch * channels, 1), 4 * self.width)  # backward computes width - 1 tokens twice
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    @cached_property
    def positions(self) -> np.ndarray:
        """p_t, int64 [T]."""
        return np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    @cached_property
    def edge(self) -> np.ndarray:
        """The tokens that see a halo, int64 [E]."""
        return np.flatnonzero(self.positions < self.width - 1)

    def edge_between(self, start: int, stop: int) -> slice:
        first, last = np.searchsorted(self.edge, (start, stop)).tolist()
        return slice(first, last)

    def edge_taps(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Edge tokens whose k-th token back lies in the halo: indices of `edge`, segments, indices into the halo."""
        segments = np.searchsorted(self.offsets, self.edge, side="right") - 1
        ago = k - self.positions[self.edge]
        counts = np.full(len(self.offsets) - 1, self.width - 1) if self.halo_counts is None else self.halo_counts
        which = np.flatnonzero((ago > 0) & (ago <= counts[segments]))
        parts = (which, segments[which], self.width - 1 - ago[which])
        return tuple(torch.from_numpy(part).to(self.x.device) for part in parts)  # type: ignore[return-value]

    @cached_property
    def edge_sums(self) -> Tensor:
        """What the halo adds to z at the edge, [B, E, D]."""
        assert self.halo is not None, "only asked for where there is one"
        sums = self.taps.new_zeros(self.x.shape[0], len(self.edge), self.x.shape[2])
        for k in range(1, self.width):
            which, segments, rows = self.edge_taps(k)
            sums[:, which] += self.taps[k] * self.halo[:, segments, rows].to(self.dtype)
        return sums

    def sums(self, start: int, stop: int) -> Tensor:
        """z of the tokens, [B, stop - start, D]."""
        first = max(start - self.width + 1, 0)
        x = self.x[:, first:stop].to(self.dtype)
        z = self.taps[0] * x[:, start - first :]
        for k in range(1, self.width):
            here = max(start, k)  # token here - k is the first that there is
            if here < stop:
                self._add(z[:, here - start :], x[:, here - k - first : stop - k - first], k, here, stop)
        if self.bias is not None:
            z += self.bias.to(self.dtype)
        if self.halo is not None:
            part = self.edge_between(start, stop)
            z[:, self.edge[part] - start] += self.edge_sums[:, part]
        return z

    def spread(self, dz: Tensor, start: int, stop: int) -> Tensor:
        """dx of the tokens from dz of tokens start ... stop + width - 2, as many as there are."""
        dx = self.taps[0] * dz[:, : stop - start]
        for k in range(1, self.width):
            last = min(stop + k, self.x.shape[1])  # readers start + k ... last - 1
            if start + k < last:
                self._add(dx[:, : last - k - start], dz[:, k : last - start], k, start + k, last)
        return dx

    def add_tap_gradients(self, dtaps: Tensor, dz: Tensor, start: int, stop: int) -> None:
        for k in range(self.width):
            here = max(start, k)
            if here < stop:
                product = dz[:, here - start :] * self.x[:, here - k : stop - k].to(self.dtype)
                if (inside := self._inside(k, here, stop)) is not None:
                    product = product.masked_fill_(~inside, 0)
                dtaps[k] += product.sum((0, 1))

    def edge_gradients(self, dtaps: Tensor, dedge: Tensor) -> Tensor:
        """The halo's gradient, from dz at the edge; adds what the halo gives to the taps'."""
        assert self.halo is not None, "only asked for where there is one"
        dhalo = torch.zeros_like(self.halo, dtype=self.dtype)
        for k in range(1, self.width):
            which, segments, rows = self.edge_taps(k)
            dz = dedge[:, which]
            dhalo[:, segments, rows] += self.taps[k] * dz  # no (segment, row) comes twice
            dtaps[k] += (dz * self.halo[:, segments, rows].to(self.dtype)).sum((0, 1))
        return dhalo

    def _add(self, target: Tensor, x: Tensor, k: int, start: int, stop: int) -> None:
        """target += w_k * x for the reading tokens start ... stop - 1 whose k-th token back is in their segment."""
        inside = self._inside(k, start, stop)
        if inside is None:
            target.addcmul_(x, self.taps[k])
        else:
            target += (x * self.taps[k]).masked_fill_(~inside, 0)

    def _inside(self, k: int, start: int, stop: int) -> Tensor | None:
        """Which tokens t have p_t >= k, bool [stop - start, 1]; None where all have."""
        inside = self.positions[start:stop] >= k
        return None if inside.all() else torch.from_numpy(inside)[:, None].to(self.x.device)
