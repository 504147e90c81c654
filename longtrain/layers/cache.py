"""Keys and values that generation keeps."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyValueCache(NamedTuple):
    """Keys (rotated) and values that later queries will see, ``[B, size, G, K]``: token p lies in row p modulo size.

    Without a window size is at least the number of tokens so far, and doubles when it is not enough. With one it is
    window + 1 for good: a token takes the place of the one that has just left the window.
    """

    keys: Tensor
    values: Tensor
    position: int  # tokens so far

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens held, in no particular order."""
        count = min(self.position, self.keys.shape[1])
        return self.keys[:, :count], self.values[:, :count]

    def in_order(self) -> tuple[Tensor, Tensor]:
        """The same, oldest token first."""
        size = self.keys.shape[1]
        if self.position <= size:
            return self.held()
        return self.keys.roll(-(self.position % size), 1), self.values.roll(-(self.position % size), 1)

    def extended(self, k: Tensor, v: Tensor, *, ring: bool) -> "KeyValueCache":
        """With the keys and values of further tokens, ``[B, n, G, K]``; written in place where they fit."""
        keys, values = self.keys, self.values
        end = self.position + k.shape[1]
        if not ring and end > keys.shape[1]:
            more = max(end, 2 * keys.shape[1]) - keys.shape[1]
            keys, values = (torch.cat((x, x.new_empty(x.shape[0], more, *x.shape[2:])), 1) for x in (keys, values))
        size = keys.shape[1]
        first = max(self.position, end - size)  # older ones would only be overwritten
        rows = torch.arange(first, end, device=k.device) % size
        keys[:, rows], values[:, rows] = k[:, first - self.position :], v[:, first - self.position :]
        return KeyValueCache(keys, values, end)
