"""A damped exponential moving average with several rates for each channel, over ranks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels.precision import without_autocast
from longtrain.layers.chunks import Chunks, sums_over_earlier
from longtrain.layers.recurrence import state_dtype
from longtrain.parallel import sequence_parallel_linear_attention


class DampedAverage(nn.Module):
    """``y_t = eta . s_t + omega x_t``, ``s_t = lambda * s_{t-1} + alpha * beta x_t``, ``lambda = 1 - alpha * delta``.

    "Mega: Moving Average Equipped Gated Attention", equations 2 to 5: for each channel h rates with alpha and delta
    between 0 and 1 (sigmoids of what is learned), beta and eta, and as in the authors' code a residual weight omega,
    then SiLU.

    In chunks of L tokens: inside one, y is a convolution with L taps, one product of matrices for each channel; what
    a chunk adds to s is one token of a recurrence over chunks, which runs over ranks as linear attention with h heads
    of width 1 for each channel.

    Args:
        channels: D. rates: h.
    """

    def __init__(self, channels: int, rates: int) -> None:
        super().__init__()
        self.channels, self.rates = channels, rates
        numbers = channels * rates  # of one dimension: they are no matrix between channels
        self.alpha = nn.Parameter(0.2 * torch.randn(numbers))
        self.delta = nn.Parameter(0.2 * torch.randn(numbers))
        # Signs that alternate let the rates start as a difference of averages, as in the authors' code.
        signs = torch.ones(rates)
        signs[1::2] = -1
        self.beta = nn.Parameter(signs.repeat(channels) + 0.02 * torch.randn(numbers))
        self.eta = nn.Parameter(torch.randn(numbers) * rates**-0.5)
        self.omega = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor, chunks: Chunks) -> Tensor:
        """x ``[B, T_w, D]`` on ``chunks.home`` -> y alike, in x's dtype."""
        with without_autocast(x.device):
            rates = _Rates(self, state_dtype(x.dtype))
            grid = chunks.grid(x.to(rates.write.dtype))
            # A short chunk is its document's last one, so that nobody asks for its state.
            before = _states_before(rates.added(grid), chunks.length * rates.log_decay, chunks)
            return self._close(x, chunks.tokens(rates.inside(grid) + rates.carried(before, chunks.length)))

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """s before the first token, ``[B, D, h]``, for inputs of a dtype."""
        return torch.zeros(batch, self.channels, self.rates, device=device, dtype=state_dtype(dtype))

    def prefill(self, x: Tensor, state: Tensor, *, chunk: int) -> tuple[Tensor, Tensor]:
        """From s ``[B, D, h]`` on, on one device: x ``[B, T, D]`` -> y alike, and s after the last token.

        chunk: tokens that are convolved at once.
        """
        if not x.shape[1]:
            return x, state
        with without_autocast(x.device):
            rates, sums = _Rates(self, state.dtype), []
            for piece in x.to(state.dtype).split(chunk, 1):
                grid, tokens = piece[:, None], piece.shape[1]
                sums.append((rates.inside(grid) + rates.carried(state[:, None], tokens))[:, 0])
                state = state * (tokens * rates.log_decay).exp() + rates.added(grid)[:, 0]
            return self._close(x, torch.cat(sums, 1)), state

    def _close(self, x: Tensor, sums: Tensor) -> Tensor:
        return F.silu(sums + self.omega.to(sums.dtype) * x.to(sums.dtype)).to(x.dtype)


class _Rates:
    """A module's rates as numbers, and the three products that they take part in. Grids are ``[B, N, L, D]``."""

    def __init__(self, module: DampedAverage, dtype: torch.dtype) -> None:
        alpha, delta, beta, eta = (
            weight.to(dtype).view(module.channels, module.rates)
            for weight in (module.alpha, module.delta, module.beta, module.eta)
        )
        self.write = torch.sigmoid(alpha) * beta  # [D, h]
        self.log_decay = torch.log1p(-torch.sigmoid(alpha) * torch.sigmoid(delta))  # [D, h]
        self.read = eta

    def powers(self, first: int, stop: int) -> Tensor:
        """lambda to the powers first ... stop - 1, ``[stop - first, D, h]``."""
        exponents = torch.arange(first, stop, device=self.write.device, dtype=self.write.dtype)
        return (exponents[:, None, None] * self.log_decay).exp()

    def inside(self, grid: Tensor) -> Tensor:
        """What the tokens of a chunk give to each other: y without what came before, ``[B, N, L, D]``."""
        length = grid.shape[2]
        taps = (self.read * self.write * self.powers(0, length)).sum(-1)  # [L, D]
        place = torch.arange(length, device=grid.device)
        back = place[:, None] - place
        # The filter of each channel as a matrix [L, L], which is 0 above its diagonal.
        matrices = taps.T[:, back.clamp(min=0)] * (back >= 0)
        return sums_over_earlier(matrices, grid)

    def added(self, grid: Tensor) -> Tensor:
        """What the tokens of a chunk add to s at its end, ``[B, N, D, h]``."""
        return torch.einsum("bnld,ldh->bndh", grid, self.write * self.powers(0, grid.shape[2]).flip(0))

    def carried(self, before: Tensor, length: int) -> Tensor:
        """What s before a chunk ``[B, N, D, h]`` gives to its tokens, ``[B, N, L, D]``."""
        return torch.einsum("bndh,ldh->bnld", before, self.read * self.powers(1, length + 1))


def _states_before(added: Tensor, log_decay: Tensor, chunks: Chunks) -> Tensor:
    """s before each chunk, from what each adds ``[B, N, D, h]`` and the decay over a chunk ``[D, h]``."""
    values = added.flatten(2)[..., None]  # a head of width 1 for each channel and rate
    one = values.new_ones(*values.shape[:2], 1, 1)
    states, _ = sequence_parallel_linear_attention(one, one, values, log_decay.flatten(), chunks.chunks, scale=1.0)
    return chunks.before(states.view_as(added))
