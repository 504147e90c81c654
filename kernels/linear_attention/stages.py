"""Which classes run the two passes of linear attention, in stages, for a backend."""

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.linear_attention import torch_impl


class Stages(NamedTuple):
    """The classes of `torch_impl`, or others with the same arguments, methods and results."""

    forward: type[torch_impl.LinearAttentionForward]
    backward: type[torch_impl.LinearAttentionBackward]


def chosen(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that runs a call: `choose_backend` for its device, dtypes and widths."""
    return choose_backend(
        "linear_attention",
        backend,
        device=q.device,
        dtype=reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype)),
        widths={"K": q.shape[3], "V": v.shape[3]},
    )


def stages(backend: str) -> Stages:
    """For "torch" or "triton", whose modules are imported here and nowhere else."""
    if backend == "triton":
        from longtrain.kernels.linear_attention import triton_impl

        return Stages(triton_impl.LinearAttentionForward, triton_impl.LinearAttentionBackward)  # pyright: ignore[reportArgumentType] the same methods
    return Stages(torch_impl.LinearAttentionForward, torch_impl.LinearAttentionBackward)
