"""Random sequences for the tests: layouts of every kind, document boundaries, windows, numbers."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from longtrain.parallel.layouts import Layout


class RandomAssignment(Layout):
    """Every token on a rank of its own choice: the least orderly layout there is."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        owners = np.random.default_rng(self.seed).integers(world, size=length)
        held = np.flatnonzero(owners == rank)
        return np.stack([held, held + 1], axis=1)


class PerDocument(Layout):
    """Every document cut into W chunks: a layout that depends on the documents."""

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        starts, sizes = cu_seqlens[:-1], np.diff(cu_seqlens)
        return np.stack([starts + rank * sizes // world, starts + (rank + 1) * sizes // world], axis=1)


layouts = st.one_of(
    st.sampled_from(["contiguous", "zigzag", "striped", "balanced", PerDocument()]),
    st.integers(1, 9).map(lambda width: f"striped:{width}"),
    st.integers(0, 1000).map(RandomAssignment),
)
windows = st.one_of(st.none(), st.tuples(*[st.none() | st.integers(0, 20)] * 2))


@st.composite
def boundaries(draw: st.DrawFn, length: int, documents: int | None = None) -> list[int]:
    """Document boundaries of a sequence, empty documents among them."""
    inside = st.lists(
        st.integers(0, length),
        min_size=0 if documents is None else documents - 1,
        max_size=6 if documents is None else documents - 1,
    )
    return [0, *sorted(draw(inside)), length]


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same normal numbers on every rank, rounded to `dtype`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
