"""Whether what a forward pass saves for backward stays in memory, so that it may be tensors that save messages."""

import torch
from torch._C import _autograd  # pyright: ignore[reportMissingModuleSource]


def saved_as_it_is() -> bool:
    """Whether saved tensors stay as they are: not where they are recomputed, offloaded or compiled."""
    if torch.compiler.is_compiling():
        return False
    top = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is None
