"""Calls of linear attention, and what each comes to: token by token on one device, and on this rank of a group."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.kernels.linear_attention import linear_attention
from longtrain.parallel import SequenceShard, sequence_parallel_linear_attention
from tests.parallel.comparing import relative_error

SHARDED = ("q", "k", "v", "out", "dq", "dk", "dv", "dout")  # and decays with a token dimension


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors."""

    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    decay: str | None = "token"  # None, "head" [H], "token" [B, T, H] or "channel" [B, T, H, K]
    strength: float = 0.02  # of the log-decay: slow, so that states live through whole ranks
    initial: bool = False
    state: bool = False
    scale: float | None = None
    batch: int = 1
    heads: int = 2
    groups: int = 2
    key_width: int = 5
    value_width: int = 4


BATCHED = Case(layout="zigzag", decay="channel", batch=2, initial=True, state=True)
PACKED = Case(layout="zigzag", documents=(0, 5, 12, 20, 29, 37), decay="channel", initial=True, state=True)
CASES = (
    Case(layout="contiguous", decay=None),
    Case(layout="zigzag", decay=None, initial=True, state=True, scale=0.6),
    Case(layout="contiguous", decay="head", initial=True, state=True, heads=4, groups=2),
    Case(layout="zigzag", decay="head", batch=2, heads=4, groups=1),
    Case(layout="contiguous", decay="token", batch=2, initial=True, state=True),
    Case(layout="zigzag", decay="token", state=True, value_width=7),
    Case(layout="contiguous", decay="channel", initial=True),
    Case(layout="contiguous", decay="channel", state=True, heads=4, groups=2),
    BATCHED,
    # Documents that end inside every rank, on the cuts between ranks, that span several ranks; empty ones.
    Case(layout="contiguous", documents=(0, 5, 12, 20, 29, 37), initial=True, state=True),
    PACKED,
    Case(layout="contiguous", documents=(0, 0, 9, 18, 18, 37), decay="head", initial=True, state=True),
    Case(layout="zigzag", documents=(0, 18, 19, 36, 37), decay="token", heads=4, groups=2, state=True),
    Case(layout="zigzag", documents=(0, 1, 35, 37, 37), decay=None, initial=True, state=True),
    Case(layout="contiguous", documents=(0, 30, 37), decay="channel", strength=5.0, initial=True, state=True),
    Case(layout="zigzag", tokens=3, decay="token", initial=True, state=True),
    Case(layout="contiguous", tokens=2, documents=(0, 1, 2), decay="channel", initial=True, state=True),
    Case(layout="zigzag", tokens=1, decay="head", initial=True, state=True),
    Case(layout="contiguous", tokens=151, decay="channel", state=True),  # several chunks on a rank
)


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: the call's arguments, and the gradients of its results."""
    seeded = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded, dtype=torch.float64)

    rows, state = (case.batch, case.tokens), (case.batch, case.heads, case.key_width, case.value_width)
    shapes = {"head": (case.heads,), "token": (*rows, case.heads), "channel": (*rows, case.heads, case.key_width)}
    inputs = {
        "q": normal(*rows, case.groups, case.key_width),
        "k": normal(*rows, case.groups, case.key_width),
        "v": normal(*rows, case.heads, case.value_width),
        "initial": normal(*state),
        "dout": normal(*rows, case.heads, case.value_width),
        "dstate": normal(*state),
    }
    if case.decay is not None:
        inputs["decay"] = -case.strength * normal(*shapes[case.decay]).abs()
    return inputs


Attend = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor | None]]


def with_gradients(
    case: Case, attend: Attend, inputs: dict[str, Tensor], dtype: torch.dtype, *, state_weight: float = 1.0
) -> dict[str, Tensor]:
    """out, state and all gradients of one call on `inputs`; the loss weighs out and state at random."""
    names = ["q", "k", "v"] + ["decay"] * (case.decay is not None) + ["initial"] * case.initial
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in names}
    out, state = attend(leaves)
    wide = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype
    loss = (out.to(wide) * inputs["dout"].to(wide)).sum()
    results = {"out": out.detach()}
    assert (state is not None) == case.state
    if state is not None:
        assert state.dtype == wide and state.shape == inputs["dstate"].shape
        loss = loss + state_weight * (state * inputs["dstate"].to(wide)).sum()
        results["state"] = state.detach()
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype, name
        results["d" + name] = leaf.grad
    return results


def recurrence(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole call on one device, token by token."""
    bounds = None if case.documents is None else torch.tensor(case.documents)
    documents = 1 if case.documents is None else len(case.documents) - 1
    filled = [n for n in range(documents) if case.documents is None or case.documents[n] < case.documents[n + 1]]

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        initial = leaves.get("initial")
        if initial is not None and bounds is not None:
            # It enters the document of the first token; all others start from zeros.
            zeros = torch.zeros_like(initial)
            initial = torch.cat([initial if n == filled[0] else zeros for n in range(documents)])
        out, state = linear_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            leaves.get("decay"),
            scale=case.scale,
            initial_state=initial,
            return_state=case.state,
            cu_seqlens=bounds,
            backend="reference",
        )
        if state is not None and bounds is not None:
            state = state[filled[-1]].unsqueeze(0)
        return out, state

    return with_gradients(case, attend, whole_inputs(case), dtype)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard) -> dict[str, Tensor]:
    """This rank's tokens of whole tensors; what is replicated stays whole."""

    def is_sharded(name: str, x: Tensor) -> bool:
        return name in SHARDED or (name in ("decay", "ddecay") and x.ndim > 1)

    return {name: shard.split(x, dim=1) if is_sharded(name, x) else x for name, x in whole.items()}


def over_ranks(case: Case, dtype: torch.dtype, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's results of the call over the group, with replicated inputs' gradients summed over the group."""
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        return sequence_parallel_linear_attention(
            leaves["q"],
            leaves["k"],
            leaves["v"],
            leaves.get("decay"),
            shard,
            scale=case.scale,
            initial_state=leaves.get("initial"),
            return_state=case.state,
        )

    # Every rank uses its copy of the state, each with another weight; the weights sum to 1.
    weight = 2 * (shard.rank + 1) / (shard.world * (shard.world + 1))
    results = with_gradients(case, attend, local_parts(whole_inputs(case), shard), dtype, state_weight=weight)
    for name in ("dinitial", "ddecay"):
        if name in results and group is not None and (name == "dinitial" or case.decay == "head"):
            dist.all_reduce(results[name], group=group)
    return results


def run(x: dict[str, Tensor], shard: SequenceShard, initial: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The call as most tests make it: with a decay, and with the state after the last token."""
    return sequence_parallel_linear_attention(
        x["q"], x["k"], x["v"], x["decay"], shard, initial_state=initial, return_state=True
    )


def relative_errors(
    case: Case, results: dict[str, Tensor], truth: dict[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """The error of each of this rank's tensors in units of the true tensor."""
    local = local_parts(truth, SequenceShard(case.tokens, group, case.layout, case.documents))
    return {name: relative_error(result, local[name], truth[name]) for name, result in results.items()}


@cache
def truths(cases: tuple[Case, ...], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """What every case comes to, computed once in the test's own process for all ranks and worlds."""
    return [recurrence(case, dtype) for case in cases]
