"""What is timed: a forward and backward pass of longtrain's attention, of one process's SDPA, and of a public rival."""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longtrain.bench_attention.cases import Case, Results, inputs, squares
from longtrain.bench_common.comparing import WIDER, deviations
from longtrain.layers import SequenceParallelAttention
from longtrain.parallel import SequenceShard

Group = dist.ProcessGroup | None
RIVAL = "ring_attention_pytorch"
MOVED = " to "
RIVAL_BUCKET = 1024  # tokens: the default of its ring_flash_attn


class Side(Protocol):
    """A side holds its inputs; `run` is what is timed."""

    positions: Tensor  # [T_w] int64: the tokens of its results

    def run(self) -> Results:
        """out, dq ``[1, T_w, H, K]``, dk, dv ``[1, T_w, G, K]``: one forward and one backward pass."""
        ...


class Longtrain:
    """`SequenceParallelAttention` on this rank's tokens. The shard's plans are made in the first run, and kept.

    layout: a layout's name, or two with MOVED between: the sequence's own, and the one that attention moves to.
    """

    def __init__(self, case: Case, *, layout: str, strategy: str, group: Group, device: torch.device) -> None:
        home, _, moved = layout.partition(MOVED)
        self._shard = SequenceShard(length=case.length, group=group, layout=home, cu_seqlens=case.boundaries)
        self._attend = SequenceParallelAttention(strategy=strategy, layout=moved or "home")
        self.positions = self._shard.positions
        *qkv, self._dout = inputs(case, self.positions, device)
        self._q, self._k, self._v = (x.requires_grad_() for x in qkv)

    def run(self) -> Results:
        out = self._attend(self._q, self._k, self._v, self._shard)
        return out.detach(), *torch.autograd.grad(out, (self._q, self._k, self._v), self._dout)


class Single:
    """`scaled_dot_product_attention` of the whole sequence in one process, document by document.

    Tensors are ``[1, H, T, K]`` and dense, the order that SDPA likes best. backend: one of `sdpa_backends`, or None.
    """

    def __init__(self, case: Case, *, device: torch.device, backend: str | None = None) -> None:
        self._case, self._backend = case, backend
        self.positions = torch.arange(case.length)
        self._inputs = tuple(x.transpose(1, 2).contiguous() for x in inputs(case, self.positions, device))

    def run(self) -> Results:
        with contextlib.nullcontext() if self._backend is None else sdpa_kernel(getattr(SDPBackend, self._backend)):
            results = _by_document(self._inputs, self._case)
        return tuple(x.transpose(1, 2) for x in results)

    def losses(self, results: Results) -> dict[str, float]:
        """What this dtype loses: the results' relative error against a wider dtype, on the first key head alone."""
        share = self._case.heads // self._case.kv_heads
        wider = WIDER.get(self._case.torch_dtype, torch.float32)
        q, k, v, dout = (x[:, :count].to(wider) for x, count in zip(self._inputs, (share, 1, 1, share), strict=True))
        # Not every device has a fast kernel for grouped heads in float32: the key head is repeated, its parts summed.
        k, v = (x.repeat(1, share, 1, 1) for x in (k, v))
        out, dq, dk, dv = _by_document((q, k, v, dout), self._case)
        truth = (out, dq, dk.sum(1, keepdim=True), dv.sum(1, keepdim=True))
        mine = (x[:, :, : wanted.shape[1]] for x, wanted in zip(results, truth, strict=True))
        return deviations(squares(tuple(mine), tuple(x.transpose(1, 2) for x in truth)))


def _by_document(tensors: Results, case: Case) -> Results:
    """SDPA's out, dq, dk, dv of q, k, v, dout, all ``[1, heads, T, K]``, one document after the other."""
    bounds = zip(case.offsets, case.offsets[1:], strict=False)
    parts = [_sdpa(*(x[:, :, start:stop] for x in tensors)) for start, stop in bounds if start < stop]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(results, dim=2) for results in zip(*parts, strict=True))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def sdpa_backends(case: Case, device: torch.device) -> list[str | None]:
    """The SDPA kernels that run this case here: on a CPU whatever PyTorch picks."""
    if device.type == "cpu":
        return [None]
    usable: list[str | None] = []
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        small = Case(256, case.heads, case.kv_heads, case.width, case.dtype)
        with contextlib.suppress(RuntimeError):  # "No available kernel": not for this dtype, width or GPU
            Single(small, device=device, backend=backend).run()
            usable.append(backend)
    return usable or [None]


def rival_version() -> str | None:
    """The version of ring-attention-pytorch, or None where it cannot be imported."""
    try:
        importlib.import_module(RIVAL)
        return importlib.import_module("importlib.metadata").version("ring-attention-pytorch")
    except ImportError:
        return None


class Rival:
    """ring-attention-pytorch's ring over contiguous shards, in the default group; its path for devices without CUDA."""

    def __init__(self, case: Case, *, world: int, rank: int, device: torch.device) -> None:
        if case.length % world:
            raise ValueError(f"length: got {case.length}, expected a multiple of the {world} processes")
        self._attention: Callable[..., Any] = importlib.import_module(RIVAL).ring_flash_attn
        self._world = world
        tokens = case.length // world
        self.positions = torch.arange(rank * tokens, (rank + 1) * tokens)
        self._groups = case.kv_heads
        q, k, v, dout = inputs(case, self.positions, device)
        q, self._dout = self._interleaved(q), self._interleaved(dout)
        self._q, self._k, self._v = (x.requires_grad_() for x in (q, k, v))

    def _interleaved(self, x: Tensor) -> Tensor:
        """The rival's order of query heads: its head i goes with key head i % G, not i // (H / G) as elsewhere."""
        return x.unflatten(2, (self._groups, -1)).transpose(2, 3).flatten(2, 3)

    def _in_order(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (-1, self._groups)).transpose(2, 3).flatten(2, 3)

    def run(self) -> Results:
        out = self._attention(
            self._q,
            self._k,
            self._v,
            causal=True,
            bucket_size=RIVAL_BUCKET,
            ring_reduce_col=self._world > 1,
            ring_size=self._world,
        )
        dq, dk, dv = torch.autograd.grad(out, (self._q, self._k, self._v), self._dout)
        return self._in_order(out.detach()), self._in_order(dq), dk, dv
