"""The short convolution before a recurrence: each channel sees its last few tokens, then SiLU."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtrain.kernels import causal_conv1d
from longtrain.kernels.precision import without_autocast
from longtrain.layers.recurrence import is_step, state_dtype
from longtrain.parallel import SequenceShard, sequence_parallel_conv1d
from longtrain.parallel.moves import HostIndex


class ConvolvedState(NamedTuple):
    """What generation keeps of a mixer that convolves the inputs of its recurrence."""

    inputs: Tensor  # of the convolution, the last width - 1 [B, width - 1, C]
    memory: Tensor  # [B, H, K, V], float32 (float64 for a float64 model)

    @staticmethod
    def of(inputs: Tensor | None, memory: Tensor | None) -> "ConvolvedState | None":
        """The state after a call, None where nobody wants it."""
        return None if inputs is None or memory is None else ConvolvedState(inputs, memory)


class ShortConvolution(nn.Module):
    """``y_t = silu(bias + sum_{i < width} weight[:, width - 1 - i] * x_{t - i})``, channel by channel.

    Tokens before the document's first count as 0. ("Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
    section 3.4.) Over ranks only the ``width - 1`` tokens before each run travel.

    Args:
        channels: C.
        width: tokens that one output sees, itself included; None: no convolution, ``y_t = silu(x_t)``.
        bias: whether there is one.

    The weight is ``[C, 1, width]``, as in ``nn.Conv1d``: a stack of C filters rather than a matrix.
    """

    def __init__(self, channels: int, width: int | None, *, bias: bool = False) -> None:
        super().__init__()
        self.channels = channels
        self.width = width
        self.weight = None if width is None else nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias and width is not None else None
        if self.weight is not None and width is not None:
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)  # what nn.Conv1d draws

    def empty_state(self, memory: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> ConvolvedState:
        """The state before the first token of a mixer whose memory has shape (B, H, K, V), for inputs of a dtype."""
        return ConvolvedState(
            torch.zeros(memory[0], (self.width or 1) - 1, self.channels, device=device, dtype=dtype),
            torch.zeros(*memory, device=device, dtype=state_dtype(dtype)),
        )

    def forward(self, x: Tensor, shard: SequenceShard, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Convolve this rank's tokens.

        x: ``[B, T_w, C]``. state: None in training; otherwise the last inputs ``[B, width - 1, C]`` before these, which
            are the whole of one document's next piece on one device.

        Returns:
            y ``[B, T_w, C]`` in x's dtype and the last inputs after these (None for None).
        """
        if self.weight is None:
            return F.silu(x), state
        weight = self.weight[:, 0]
        if state is None:
            return sequence_parallel_conv1d(x, weight, self.bias, shard, activation="silu"), None
        seen = torch.cat((state.to(x.dtype), x), 1)
        # A copy: a view would keep the whole prompt.
        after = seen[:, x.shape[1] :].clone()
        if is_step(shard, state):
            return self._last_token(seen, weight), after
        whole = SequenceShard(length=seen.shape[1])
        y = sequence_parallel_conv1d(seen, weight, self.bias, whole, activation="silu")
        return y[:, state.shape[1] :], after

    def after(self, x: Tensor, before: Tensor, shard: SequenceShard) -> Tensor:
        """Convolve this rank's tokens, of documents that all follow the same inputs, which every rank has.

        x: ``[B, T_w, C]``. before: ``[B, n, C]``, as if they stood in front of each document.

        Returns:
            y ``[B, T_w, C]`` in x's dtype.
        """
        if self.weight is None or self.width is None or self.width == 1:
            return self(x, shard, None)[0]
        weight, reach = self.weight[:, 0], self.width - 1
        y = sequence_parallel_conv1d(x, weight, self.bias, shard)
        # What each of a document's first tokens sees of them: theirs, where nothing comes after.
        missing = max(reach - before.shape[1], 0)
        seen = F.pad(before[:, -reach:], (0, 0, missing, reach))
        sums = causal_conv1d(seen, weight)[:, reach:]
        rows, places = first_tokens(shard, reach)
        y = y.index_add(1, rows.on(x.device), sums.index_select(1, places.on(x.device)))
        return F.silu(y)

    def _last_token(self, seen: Tensor, weight: Tensor) -> Tensor:
        """``[B, width, C]`` -> ``[B, 1, C]``."""
        dtype = state_dtype(seen.dtype)
        with without_autocast(seen.device):
            y = (seen.to(dtype) * weight.T.to(dtype)).sum(1, keepdim=True)
            y = y if self.bias is None else y + self.bias.to(dtype)
            return F.silu(y).to(seen.dtype)


def first_tokens(shard: SequenceShard, count: int) -> tuple[HostIndex, HostIndex]:
    """Which local tokens are among the first so many of their document, and their positions there."""
    kept = shard.plans.setdefault(shard, {})
    key = ("first tokens", count)
    if key not in kept:
        inside = shard.document_positions.numpy()
        rows = np.flatnonzero(inside < count)
        kept[key] = HostIndex(rows), HostIndex(inside[rows])
    return kept[key]


def check_conv_width(width: int | None) -> None:
    """Refuse, with a ValueError, a convolution that sees no token."""
    if width is not None and width < 1:
        raise ValueError(f"conv_width: got {width}, it must be at least 1")
