"""How far NaN and inf reach: one bad number in each document of each head, compared with the recurrence.

The recurrence never multiplies what a token cannot see, so autograd through it says who depends on a number and who
does not. Documents and heads share nothing, so that one run tells about a bad number in each of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.test_linear_attention import errors


def spoil(this: Any, places: Sequence[tuple[str, float]], *, seed: int) -> Any:
    """A copy of a problem whose nth (document, head) has places[n], (tensor, bad number), at one of its tokens.

    A tensor is an input, or "d" and the name of a result whose gradient is meant. Documents are packed in one row; no
    heads are shared.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = this.options["cu_seqlens"].tolist()
    inputs, gradients = ({name: x.clone() for name, x in part.items()} for part in (this.inputs, this.gradients))
    heads = inputs["v"].shape[2]
    assert all(inputs[name].shape[2] == heads for name in ("q", "k"))
    for n, (name, bad) in enumerate(places):
        document, head = divmod(n, heads)
        x = gradients[name[1:]] if name[0] == "d" else inputs[name]
        per_document = x.shape[0] == len(bounds) - 1 and len(bounds) > 2
        low, high = (document, document + 1) if per_document else bounds[document : document + 2]
        at = int(torch.randint(low, high, (1,), generator=generator))
        row = x[at, head] if per_document else x[0, at, head]
        row.view(-1)[int(torch.randint(row.numel(), (1,), generator=generator))] = bad
    return type(this)(inputs, gradients, this.options)


def assert_only_who_sees_it_is_reached(
    this: Any, spoilt: Any, backend: str, dtype: torch.dtype, *, spared: dict[str, Tensor] | None = None
) -> None:
    """Results that depend on a bad number are not finite; all others are what they are without it.

    Within a token's vector all count as reached where one is. The allowed error is 4 times what float32 costs the
    recurrence on the clean problem. spared: by name, tokens [T, H] that may be reached or not.
    """
    clean = {name: x.detach() for name, x in this.solve(torch.float64, "reference").items()}
    allowed = errors(this.solve(torch.float32, "reference"), clean)
    true, got = spoilt.solve(torch.float64, "reference"), spoilt.solve(dtype, backend)
    for name, x in true.items():
        bad, y = ~x.detach().isfinite(), got[name].detach().double()
        assert not y[bad].isfinite().any(), f"{name}: hidden at {(bad & y.isfinite()).nonzero()[0].tolist()}"
        width = x.ndim - (2 if x.shape[0] != 1 else 3)  # states [N, H, ...], tokens [1, T, H, ...]
        unreached = ~bad
        if width > 0:
            unreached = ~bad.flatten(-width).any(-1)[(..., *(None,) * width)].expand_as(bad)
        if spared and name in spared:
            unreached = unreached & ~spared[name].view(1, *spared[name].shape, *(1,) * width)
        error = torch.where(unreached, (y - clean[name]).abs(), 0)
        limit = max(4 * allowed[name], 1e-5 if dtype == torch.float32 else 1e-10) * clean[name].abs().max()
        worst = error.nan_to_num(nan=torch.inf)
        assert worst.max() <= limit, (name, (worst > limit).nonzero()[0].tolist(), float(worst.max()), float(limit))
