"""Calls of ring attention, and what each comes to: by definition on one device, and on this rank of a group."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longtrain.kernels.softmax_attention import softmax_attention
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from tests.parallel.comparing import relative_error

Group = dist.ProcessGroup | DeviceMesh | None
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors; `keys` and what begins with `key_` make it cross-attention."""

    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    keys: int | None = None
    key_layout: str = "contiguous"
    key_documents: tuple[int, ...] | None = None
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    batch: int = 1
    heads: int = 2
    groups: int = 2
    key_width: int = 8
    value_width: int = 8
    dominant_keys: bool = False
    heads_at_once: int | None = None
    backend: str = "auto"


GROUPED = Case(layout="zigzag", batch=2, heads=4, groups=2, value_width=5)
PACKED = Case(layout="contiguous", documents=(0, 5, 5, 18, 23, 37), heads=6, groups=2, sinks=True)
CROSS = Case(layout="striped", keys=19, key_layout="zigzag", heads=4, groups=2)  # fewer keys: some queries see none

# A cover of the options by hand: each layout meets each kind of mask, and each option at least two layouts.
CASES = (
    Case(layout="contiguous"),
    GROUPED,
    Case(layout="striped", heads=4, groups=1, softcap=2.5, window=(9, None)),
    Case(layout="striped:3", sinks=True, heads=3, groups=3, key_width=5),
    PACKED,
    Case(layout="zigzag", documents=(0, 1, 12, 36, 37), window=(4, 0), softcap=1.5),
    Case(layout="striped", documents=(0, 16, 17, 37), value_width=3, scale=0.7),
    Case(layout="striped:3", documents=(0, 0, 20, 37), causal=False, window=(3, 5)),
    Case(layout="contiguous", causal=False, window=(None, 2), heads=4, groups=2),
    Case(layout="zigzag", causal=False, batch=2, sinks=True),
    Case(layout="striped", tokens=3, heads=4, groups=2),
    Case(layout="zigzag", tokens=2, documents=(0, 1, 2)),
    Case(layout="contiguous", tokens=1, causal=False, softcap=2.0),
    Case(layout="striped:3", tokens=41, window=(0, 0)),
    Case(layout="zigzag", keys=53, key_layout="striped", causal=False, value_width=6),
    CROSS,
    Case(
        layout="contiguous",
        documents=(0, 11, 30, 37),
        keys=29,
        key_layout="striped:3",
        key_documents=(0, 20, 20, 29),
        window=(6, 1),
        causal=False,
        sinks=True,
    ),
    Case(layout="zigzag", tokens=509, heads=1, groups=1),  # long enough for whole tiles of every kind
    Case(layout="striped", keys=3, key_layout="contiguous", causal=False),
    Case(layout="zigzag", documents=(0, 13, 37), backend="reference", softcap=3.0, sinks=True),
    Case(layout="striped", documents=(0, 13, 37), backend="chunked", softcap=3.0, sinks=True),
    Case(layout="zigzag", tokens=509, heads=2, groups=1, window=(300, None), backend="chunked"),
)


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: q, k, v, sinks, and the gradients of out and lse."""
    seeded = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded, dtype=torch.float64)

    keys = case.tokens if case.keys is None else case.keys
    q = normal(case.batch, case.tokens, case.heads, case.key_width)
    k = normal(case.batch, keys, case.groups, case.key_width)
    if case.dominant_keys:
        k *= 10
        k[:, 1::11] *= torch.linspace(5, 30, k[:, 1::11].shape[1], dtype=k.dtype)[:, None, None]
    return {
        "q": q,
        "k": k,
        "v": normal(case.batch, keys, case.groups, case.value_width),
        "sinks": normal(case.heads),
        "dout": normal(case.batch, case.tokens, case.heads, case.value_width),
        "dlse": normal(case.batch, case.tokens, case.heads),
    }


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def with_gradients(attend: Attend, inputs: dict[str, Tensor], dtype: torch.dtype, *, sinks: bool) -> dict[str, Tensor]:
    """out, lse and all gradients of one call on `inputs`, whose loss weighs out and lse at random."""
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], leaves["sinks"] if sinks else None)
    assert lse is not None and out.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert lse.dtype == wide
    loss = (out.to(wide) * inputs["dout"].to(wide)).sum()
    # Queries that see nothing have an lse of -inf, which no loss uses.
    loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * inputs["dlse"].to(wide)).sum()
    loss.backward()
    results = {"out": out.detach(), "lse": lse.detach()}
    for name in ("q", "k", "v") + (("sinks",) if sinks else ()):
        gradient = leaves[name].grad
        assert gradient is not None and gradient.dtype == dtype
        results["d" + name] = gradient
    return results


def dense(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole call on one device, by definition."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        documents, key_documents = (
            None if bounds is None else torch.tensor(bounds) for bounds in (case.documents, case.key_documents)
        )
        return softmax_attention(
            q,
            k,
            v,
            causal=case.causal,
            window=case.window,
            cu_seqlens=documents,
            cu_seqlens_k=key_documents,
            scale=case.scale,
            softcap=case.softcap,
            sinks=sinks,
            backend="reference",
        )

    return with_gradients(attend, whole_inputs(case), dtype, sinks=case.sinks)


def shards(case: Case, group: Group) -> tuple[SequenceShard, SequenceShard | None]:
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)
    if case.keys is None:
        return shard, None
    return shard, SequenceShard(case.keys, group, case.key_layout, case.key_documents)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard, key_shard: SequenceShard | None) -> dict[str, Tensor]:
    """This rank's tokens of whole tensors."""
    rows = {name: key_shard or shard if name in ("k", "v", "dk", "dv") else shard for name in whole}
    return {name: x if x.ndim == 1 else rows[name].split(x, dim=1) for name, x in whole.items()}


def over_ranks(case: Case, dtype: torch.dtype, group: Group, strategy: str = "auto") -> dict[str, Tensor]:
    """This rank's results of the call over the group, with the sinks' gradient summed over the group."""
    shard, key_shard = shards(case, group)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return sequence_parallel_attention(
            q,
            k,
            v,
            shard,
            key_shard=key_shard,
            causal=case.causal,
            window=case.window,
            scale=case.scale,
            softcap=case.softcap,
            sinks=sinks,
            strategy=strategy,
            heads_at_once=case.heads_at_once,
            backend=case.backend,
        )

    results = with_gradients(attend, local_parts(whole_inputs(case), shard, key_shard), dtype, sinks=case.sinks)
    if case.sinks and group is not None:
        dist.all_reduce(results["dsinks"], group=shard.group)
    return results


def relative_errors(case: Case, results: dict[str, Tensor], truth: dict[str, Tensor], group: Group) -> dict[str, float]:
    """The error of each of this rank's tensors in units of the true tensor."""
    local = local_parts(truth, *shards(case, group))
    return {name: relative_error(result, local[name], truth[name]) for name, result in results.items()}


@cache
def truths(cases: tuple[Case, ...], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """What every case comes to, computed once in the test's own process for all ranks and worlds."""
    return [dense(case, dtype) for case in cases]
