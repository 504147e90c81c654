"""A case of the benchmark: its shapes and inputs.

Inputs are told apart by their names. Those in `REPLICATED` are the same on every rank; the others have tokens in their
second dimension, of which a rank gets its own.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SEED = 20_27
REPLICATED = frozenset({"head_decay", "weight", "bias"})
FIXED = frozenset({"head_decay"})  # a constant of the model: it gets no gradient
CONV_WIDTH = 4  # taps of the convolution
NATURAL = "natural"  # layout: zigzag for softmax attention, whose work it evens out, and contiguous for the others


@dataclass(frozen=True)
class Case:
    """One operator or mixer at one length.

    kind "operator" or "mixer"; length T in tokens; heads H of width K = V, and as many slots M; D is H * K. layout: a
    layout's name, or `NATURAL`. strategy: of the linear operators; mixers have their own.
    """

    kind: str
    name: str
    length: int
    heads: int
    width: int
    dtype: str
    layout: str
    strategy: str

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Case":
        """From the JSON object of a command."""
        return cls(**fields)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def model_width(self) -> int:
        """D."""
        return self.heads * self.width


def draw(name: str, case: Case, *, tokens: int, device: torch.device, part: int = 0) -> Tensor:
    """One input, drawn on `device`: the same for the same name, shapes and part (a rank, where each draws its own).

    q, k, v, dout, unit_k ``[1, T, H, K]`` (unit_k has norm 1, as delta rules need), beta ``[1, T, H]`` in (0, 1),
    token_decay ``[1, T, H]``, channel_decay ``[1, T, H, K]``, head_decay ``[H]``, slot and slot_decay ``[1, T, H, M]``,
    x and dy ``[1, T, D]``, weight ``[D, taps]``, bias ``[D]``. Decays keep 90 % or more of a state from token to token,
    so that it is carried far. Gates and decays are in float32 at least, all others in the case's dtype.
    """
    place = 0 if name in REPLICATED else part
    generator = torch.Generator(device).manual_seed(SEED + 1000 * place + zlib.crc32(name.encode()) % 1000)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    heads, width, channels, dtype = case.heads, case.width, case.model_width, case.torch_dtype
    gates = torch.promote_types(dtype, torch.float32)
    if name in ("q", "k", "v", "dout"):
        return normal(1, tokens, heads, width).to(dtype)
    if name == "unit_k":
        return F.normalize(normal(1, tokens, heads, width), dim=-1).to(dtype)
    if name in ("x", "dy"):
        return normal(1, tokens, channels).to(dtype)
    if name == "weight":
        return (normal(channels, CONV_WIDTH) * CONV_WIDTH**-0.5).to(dtype)
    if name == "bias":
        return normal(channels).to(dtype)
    if name == "beta":
        return normal(1, tokens, heads).sigmoid().to(gates)
    if name == "head_decay":  # those of lightning attention, from a memory of two tokens to one of 256
        return -(2.0 ** (-8 * torch.arange(1, heads + 1, device=device) / heads)).to(gates)
    if name == "token_decay":
        return -0.05 * normal(1, tokens, heads).abs().to(gates)
    if name in ("channel_decay", "slot_decay"):
        return -0.05 * normal(1, tokens, heads, width).abs().to(gates)
    if name == "slot":
        return normal(1, tokens, heads, width).sigmoid().to(gates)
    raise ValueError(f"name: got {name!r}, expected the name of an input")
