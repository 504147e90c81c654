"""Arithmetic in the dtypes that operators choose, whatever `torch.autocast` would make of it."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for `device`.

    Operators say themselves what is computed in float32 and what is not. Under autocast their matrix products would be
    rounded to half precision, or fail beside sums that are not.
    """
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
