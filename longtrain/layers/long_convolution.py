"""A convolution with short and long filters, over ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels.precision import without_autocast
from longtrain.layers.chunks import Chunks, sums_over_earlier, sums_over_later
from longtrain.layers.recurrence import state_dtype


class ShortLongConvolution(nn.Module):
    """``y_t = silu(sum_{i < L} (long_i + short_i) * x_{t - i})``, channel by channel.

    "Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long Sequences", section 3.1: a short
    filter joins a long one, and as both are linear they are one filter (structural reparameterisation). The long one is
    that of "What Makes Convolutional Models Great on Long Sequence Modeling?" (equation 4): n pieces of growing scale,
    each learned at s places and interpolated linearly, piece i to ``2^max(i - 1, 0) s`` taps and weakened by ``2^-i``,
    one after the other: ``L = 2^(n - 1) s`` taps from ``n s`` numbers, near ones fine and strong, far ones coarse and
    weak. Tokens before the document's first count as 0.

    A chunk of L tokens needs its own tokens and those of the chunk before: two products of matrices for each channel.

    Args:
        channels: C. short: taps of the short filter, at most L. places: s. scales: n.
    """

    def __init__(self, channels: int, *, short: int, places: int, scales: int) -> None:
        super().__init__()
        self.channels, self.places, self.scales = channels, places, scales
        self.lengths = [places * 2 ** max(scale - 1, 0) for scale in range(scales)]
        self.taps = sum(self.lengths)
        # Of one dimension: filters are no matrices between channels.
        self.short = nn.Parameter(torch.randn(channels * short) * short**-0.5)
        self.long = nn.Parameter(torch.randn(channels * scales * places))
        self.norm = sum(length * 4.0**-scale for scale, length in enumerate(self.lengths)) ** 0.5

    def filter(self, dtype: torch.dtype) -> Tensor:
        """The taps of each channel, ``[L, C]``: the first one multiplies the token itself."""
        long = self.long.to(dtype).view(self.scales, self.channels, self.places)
        pieces = [
            F.interpolate(piece[None], length, mode="linear")[0] * 2.0**-scale
            for scale, (piece, length) in enumerate(zip(long, self.lengths, strict=True))
        ]
        short = self.short.to(dtype).view(self.channels, -1)
        return (torch.cat(pieces, 1) / self.norm + F.pad(short, (0, self.taps - short.shape[1]))).T

    def forward(self, x: Tensor, chunks: Chunks) -> Tensor:
        """x ``[B, T_w, C]`` on ``chunks.home``, chunks of L tokens -> y alike, in x's dtype."""
        with without_autocast(x.device):
            grid = chunks.grid(x.to(state_dtype(x.dtype)))
            return F.silu(chunks.tokens(self._sums(grid, chunks.before(grid)))).to(x.dtype)

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The inputs before the first token, ``[B, L, C]``."""
        return torch.zeros(batch, self.taps, self.channels, device=device, dtype=dtype)

    def prefill(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """On one device: x ``[B, T, C]`` after the inputs state ``[B, L, C]`` -> y alike, and the last inputs."""
        seen = torch.cat((state.to(x.dtype), x), 1)
        after = seen[:, x.shape[1] :].clone()  # a view would keep the whole prompt
        with without_autocast(x.device):
            wide = seen.to(state_dtype(x.dtype))
            if x.shape[1] == 1:
                sums = (wide[:, 1:] * self.filter(wide.dtype).flip(0)).sum(1, keepdim=True)
            else:
                grid = F.pad(wide, (0, 0, 0, -wide.shape[1] % self.taps)).unflatten(1, (-1, self.taps))
                sums = self._sums(grid[:, 1:], grid[:, :-1]).flatten(1, 2)[:, : x.shape[1]]
            return F.silu(sums).to(x.dtype), after

    def _sums(self, grid: Tensor, before: Tensor) -> Tensor:
        """Sums for the tokens of chunks ``[B, N, L, C]``, of which and of the chunks before them ``[B, N, L, C]``."""
        place = torch.arange(self.taps, device=grid.device)
        back = place[:, None] - place
        # Tap t - s for a token s of the same chunk, L + t - s for one of the chunk before: those that there are fill
        # one matrix, the first kind up to its diagonal and the second above.
        matrices = self.filter(grid.dtype).T[:, back % self.taps]  # [C, L, L]
        own, other = matrices * (back >= 0), matrices * (back < 0)
        return sums_over_earlier(own, grid) + sums_over_later(other, before)
