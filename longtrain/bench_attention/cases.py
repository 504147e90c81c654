"""A case of the benchmark: its shapes, its inputs, and how far one result is from another."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtrain.bench_common import comparing

NAMES = ("out", "dq", "dk", "dv")
SEED = 20_25

Results = tuple[Tensor, ...]  # in the order of NAMES


@dataclass(frozen=True)
class Case:
    """Causal self-attention of one sequence.

    length T in tokens; heads H, kv_heads G, width K; documents: lengths that sum to T, in tokens, or () for one.
    """

    length: int
    heads: int
    kv_heads: int
    width: int
    dtype: str
    documents: tuple[int, ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Case":
        """From the JSON object of a command."""
        return cls(**{**fields, "documents": tuple(fields["documents"])})

    @cached_property
    def offsets(self) -> np.ndarray:
        """int64 [N+1]: where the documents begin, and T."""
        return np.concatenate([[0], np.cumsum(self.documents or (self.length,), dtype=np.int64)])

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def boundaries(self) -> Tensor | None:
        """`cu_seqlens` for a shard; None for one document."""
        return torch.from_numpy(self.offsets) if self.documents else None


def inputs(case: Case, positions: Tensor, device: torch.device) -> Results:
    """q ``[1, T_w, H, K]``, k and v ``[1, T_w, G, K]``, and the gradient of out, at some positions ``[T_w]``.

    Every process draws the whole sequence from the same seed on the CPU, so that all sides have the same numbers.
    """
    generator = torch.Generator().manual_seed(SEED)
    drawn = []
    for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads):
        whole = torch.randn(case.length, heads, case.width, generator=generator)
        drawn.append(whole[positions][None].to(device, case.torch_dtype))
    return tuple(drawn)


def squares(results: Results, truth: Results) -> dict[str, list[float]]:
    """Squared norms of each result's difference from the truth, and of the truth (see `comparing.squares`)."""
    mine, wanted = ({str(name): x for name, x in zip(NAMES, tensors, strict=True)} for tensors in (results, truth))
    return comparing.squares(mine, wanted)
