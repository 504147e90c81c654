"""Checks of arguments that the operators share. Each raises a ValueError: "name: got ..., expected ..."."""

import math
import re

import numpy as np
import torch
from torch import Tensor

from longtrain import debug

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(name: str, x: object, shape: str) -> Tensor:
    """Refuses what is not a floating-point tensor with as many dimensions as `shape` names, "[B, T, H, K]" say."""
    given = floating_channels(name, x, shape)
    if given.ndim != shape.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(given.shape)}, expected {shape}")
    return given


def floating_channels(name: str, x: object, shape: str) -> Tensor:
    """Refuses what is not a floating-point tensor with at least one dimension and one channel, "[..., D]" say."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: got {type(x).__name__}, expected a tensor {shape}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: got dtype {x.dtype}, expected float64, float32, bfloat16 or float16")
    if x.ndim < 1:
        raise ValueError(f"{name}: got shape (), expected {shape}")
    dense(name, x)
    return x


def dense(name: str, x: Tensor) -> None:
    """Refuses sparse and other tensors that are not strided memory."""
    if x.layout != torch.strided:
        raise ValueError(f"{name}: got layout {x.layout}, expected a dense tensor, as x.to_dense() makes it")


def true_or_false(name: str, value: object) -> None:
    """Refuses what is not True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {value!r}, expected True or False")


def sizes(name: str, x: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Refuses another shape than `expected`; None stands for any size of at least 1. `meaning`: "[B, S, G, K]"."""
    fits = len(x.shape) == len(expected) and all(
        size == wanted if wanted is not None else size >= 1 for size, wanted in zip(x.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any >= 1" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {meaning} = [{wanted}]")


def same_device(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not all on the device of the first."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, device = next((name, x.device) for name, x in given.items())
    for name, x in given.items():
        if x.device != device:
            raise ValueError(f"{name}: got device {x.device}, expected that of {first}, {device}")


def grouped_heads(heads: int, groups: int, *, name: str) -> None:
    """Refuses H query heads that G key/value heads do not divide."""
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: got {groups} heads, expected a divisor of q's {heads} heads")


def linear_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuses queries, keys [B, T, G, K] and values [B, T, H, V] that do not fit together, G a divisor of H."""
    floating("q", q, "[B, T, G, K]")
    floating("k", k, "[B, T, G, K]")
    floating("v", v, "[B, T, H, V]")
    batch, tokens, heads, _ = v.shape
    sizes("v", v, (batch, tokens, None, None), "[B, T, H, V]")
    for name, x, width in (("q", q, None), ("k", k, q.shape[3])):
        if x.shape[2] < 1 or heads % x.shape[2]:
            raise ValueError(f"{name}: got {x.shape[2]} heads, expected a divisor of v's {heads} heads")
        sizes(name, x, (batch, tokens, None, width), "[B, T, G, K], with v's B and T and one K for q and k,")


def optional_log_decay(log_decay: Tensor | None, q: Tensor, v: Tensor, *, meanings: str) -> None:
    """Refuses log-decays of other shapes than `meanings` names: "[H], [B, T, H] or [B, T, H, K]". None passes."""
    if log_decay is None:
        return
    if not isinstance(log_decay, Tensor):
        raise ValueError(f"log_decay: got {type(log_decay).__name__}, expected None or a tensor {meanings}")
    if log_decay.dtype not in FLOATS:
        raise ValueError(f"log_decay: got dtype {log_decay.dtype}, expected float64, float32, bfloat16 or float16")
    known = {"[H]": (v.shape[2],), "[B, T, H]": tuple(v.shape[:3]), "[B, T, H, K]": (*v.shape[:3], q.shape[3])}
    forms = [known[form] for form in re.findall(r"\[[^]]*\]", meanings)]
    if tuple(log_decay.shape) not in forms:
        expected = " or ".join(str(list(form)) for form in forms)
        raise ValueError(f"log_decay: got shape {tuple(log_decay.shape)}, expected None or {meanings}: {expected}")
    dense("log_decay", log_decay)


def never_positive(name: str, x: Tensor | None) -> None:
    """Refuses numbers above 0; on a GPU, which would have to wait, only under `longtrain.debug.checks()`."""
    if x is None or not (x.device.type == "cpu" or debug.enabled()):
        return
    positive = x > 0
    if positive.any():
        raise ValueError(f"{name}: got {x[positive].max():g}, expected no number above 0")


def document_offsets(name: str, cu_seqlens: Tensor | np.ndarray | None, *, tokens: int, batch: int = 1) -> np.ndarray:
    """Document boundaries as numpy int64 [N+1]: `cu_seqlens` checked, or one document of all `tokens` where it is None.

    cu_seqlens: int32 or int64 [N+1], from 0 to `tokens`, never decreasing; only with one batch row.
    A tensor on an accelerator is copied to the host, which waits for it: keep it on the CPU where that matters.
    """
    if cu_seqlens is None:
        return np.array([0, tokens], dtype=np.int64)
    if not isinstance(cu_seqlens, Tensor | np.ndarray):
        raise ValueError(f"{name}: got {type(cu_seqlens).__name__}, expected an int32 or int64 tensor [N+1]")
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "meta":
        raise ValueError(f"{name}: got device meta, expected boundaries that can be read")
    offsets = cu_seqlens.detach().cpu().numpy() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    if offsets.dtype not in (np.int32, np.int64):
        raise ValueError(f"{name}: got dtype {cu_seqlens.dtype}, expected int32 or int64")
    if offsets.ndim != 1 or offsets.size < 1:
        raise ValueError(f"{name}: got shape {tuple(offsets.shape)}, expected [N+1] for N documents")
    if batch > 1:
        raise ValueError(f"{name}: got it with {batch} batch rows, expected one row")
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(f"{name}: got {offsets[0]} ... {offsets[-1]}, expected boundaries from 0 to {tokens}")
    if (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"{name}: got descending boundaries, expected boundaries that never decrease")
    return offsets.astype(np.int64)


def operator_offsets(cu_seqlens: Tensor | np.ndarray | None, *, tokens: int, batch: int) -> Tensor:
    """`document_offsets` as a registered operator takes them, a tensor int64 [N+1] on the CPU.

    A compiler cannot look at their values: what is wrong with those, the operator says when it runs.
    """
    if cu_seqlens is None:
        return torch.tensor([0, tokens])
    if isinstance(cu_seqlens, Tensor) and torch.compiler.is_compiling():
        if batch > 1:
            raise ValueError(f"cu_seqlens: got it with {batch} batch rows, expected one row")
        return cu_seqlens.detach().to("cpu", torch.int64)
    return torch.from_numpy(document_offsets("cu_seqlens", cu_seqlens, tokens=tokens, batch=batch))


def attention_window(window: object) -> tuple[int | None, int | None] | None:
    """The window as a pair (left, right) of counts >= 0, None inside for unlimited; None where nothing is limited."""
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window: got {window!r}, expected None or a pair (left, right)")
    left, right = window
    for side in (left, right):
        if side is not None and (isinstance(side, bool) or not isinstance(side, int | np.integer) or side < 0):
            raise ValueError(f"window: got {window!r}, expected counts >= 0 or None (unlimited) in the pair")
    return None if left is None else int(left), None if right is None else int(right)


def number(name: str, value: object, *, positive: bool = False) -> float | None:
    """The number as a float; refuses what is not finite (and, where asked, not above 0). None passes."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(value):
        raise ValueError(f"{name}: got {value!r}, expected a finite number or None")
    if positive and value <= 0:
        raise ValueError(f"{name}: got {value!r}, expected a number above 0 or None")
    return float(value)
