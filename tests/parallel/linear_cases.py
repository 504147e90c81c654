"""Calls of the linear mixers, and what each comes to: token by token on one device, and on this rank of a group."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.kernels import gated_delta_rule, gated_slot_attention, linear_attention
from longtrain.parallel import (
    SequenceShard,
    sequence_parallel_delta_rule,
    sequence_parallel_linear_attention,
    sequence_parallel_slot_attention,
)
from tests.parallel.comparing import relative_error

ARGUMENTS = {
    "linear": ("q", "k", "v", "decay"),
    "delta": ("q", "k", "v", "beta", "decay"),
    "slot": ("q", "k", "v", "slot", "decay"),
}
ALONE = {"linear": linear_attention, "delta": gated_delta_rule, "slot": gated_slot_attention}
OVER_RANKS = {
    "linear": sequence_parallel_linear_attention,
    "delta": sequence_parallel_delta_rule,
    "slot": sequence_parallel_slot_attention,
}
STRATEGIES = ("allgather", "alltoall", "chain", "ulysses")
SHARDED = ("q", "k", "v", "beta", "slot", "out")  # with their gradients; and decays with a token dimension
State = Any  # a tensor, or slot attention's pair


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors."""

    mixer: str = "linear"  # "linear", "delta" or "slot"
    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    decay: str | None = (
        "token"  # None, "head" [H], "token" [B, T, H] or "channel" [B, T, H, K]; slot attention's [.., M]
    )
    strength: float = 0.02  # of the log-decay: slow, so that states live through whole ranks
    initial: bool = False
    state: bool = False
    scale: float | None = None
    batch: int = 1
    heads: int = 2
    groups: int = 2
    key_width: int = 5
    value_width: int = 4
    slots: int = 3
    strategy: str = "auto"

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(name for name in ARGUMENTS[self.mixer] if name != "decay" or self.decay is not None)

    @property
    def states(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the state's parts, without rows."""
        keys, values = self.key_width, self.value_width
        if self.mixer == "slot":
            return {"A": (self.heads, keys, self.slots), "C": (self.heads, self.slots, values)}
        return {"S": (self.heads, keys, values)}


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
    Case("delta", layout="contiguous", decay=None, initial=True, state=True),
    Case("delta", layout="zigzag", decay="token", batch=2, heads=4, groups=2, state=True),
    Case("delta", layout="zigzag", decay="channel", initial=True, value_width=7),
    Case("delta", layout="contiguous", documents=(0, 5, 12, 20, 29, 37), initial=True, state=True),
    Case("delta", layout="zigzag", documents=(0, 1, 30, 30, 37), decay="channel", initial=True, state=True),
    Case("delta", layout="zigzag", tokens=3, decay="token", initial=True, state=True),
    Case("delta", layout="contiguous", tokens=151, decay="token", state=True),
    Case("slot", layout="contiguous", initial=True, state=True),
    Case("slot", layout="zigzag", batch=2, heads=4, groups=2, state=True),
    Case("slot", layout="zigzag", initial=True, value_width=7, slots=6),
    Case("slot", layout="contiguous", documents=(0, 5, 12, 20, 29, 37), initial=True, state=True),
    Case("slot", layout="zigzag", documents=(0, 1, 30, 30, 37), initial=True, state=True),
    Case("slot", layout="zigzag", tokens=3, initial=True, state=True),
    Case("slot", layout="contiguous", tokens=151, state=True),
)


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: the call's arguments, and the gradients of its results.

    By name: q, k, v and the mixer's others, initial_S (or initial_A, initial_C), dout, dstate_S ...
    """
    seeded = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded, dtype=torch.float64)

    rows, heads, width = (case.batch, case.tokens), case.heads, case.key_width
    shapes = {"head": (heads,), "token": (*rows, heads), "channel": (*rows, heads, width)}
    inputs = {
        "q": normal(*rows, case.groups, width),
        "k": normal(*rows, case.groups, width),
        "v": normal(*rows, heads, case.value_width),
        "dout": normal(*rows, heads, case.value_width),
    }
    for name, shape in case.states.items():
        inputs["initial_" + name], inputs["dstate_" + name] = normal(case.batch, *shape), normal(case.batch, *shape)
    if case.mixer == "delta":  # keys of length 1, so that no state grows
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = normal(*rows, heads).sigmoid()
    if case.mixer == "slot":
        inputs["slot"] = normal(*rows, heads, case.slots)
        inputs["decay"] = -case.strength * normal(*rows, heads, case.slots).abs()
    elif case.decay is not None:
        inputs["decay"] = -case.strength * normal(*shapes[case.decay]).abs()
    return inputs


Attend = Callable[[dict[str, Tensor]], tuple[Tensor, State]]


def initial_of(case: Case, leaves: dict[str, Tensor]) -> State:
    """The initial state as the call takes it, or None."""
    given = tuple(leaves["initial_" + name] for name in case.states if "initial_" + name in leaves)
    return None if not given else given if case.mixer == "slot" else given[0]


def parts_of(case: Case, state: State) -> dict[str, Tensor]:
    """A state's parts by name."""
    return dict(zip(case.states, state if case.mixer == "slot" else [state], strict=True))


def with_gradients(
    case: Case, attend: Attend, inputs: dict[str, Tensor], dtype: torch.dtype, *, state_weight: float = 1.0
) -> dict[str, Tensor]:
    """out, state and all gradients of one call on `inputs`; the loss weighs out and state at random."""
    names = [*case.arguments, *(f"initial_{name}" for name in case.states if case.initial)]
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in names}
    out, state = attend(leaves)
    wide = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype
    loss = (out.to(wide) * inputs["dout"].to(wide)).sum()
    results = {"out": out.detach()}
    assert (state is not None) == case.state
    for name, part in parts_of(case, state).items() if state is not None else ():
        assert part.dtype == wide and part.shape == inputs["dstate_" + name].shape
        loss = loss + state_weight * (part * inputs["dstate_" + name].to(wide)).sum()
        results["state_" + name] = part.detach()
    loss.backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None and leaf.grad.dtype == dtype, name
        results["d" + name] = leaf.grad
    return results


def arguments_of(case: Case, leaves: dict[str, Tensor]) -> list[Any]:
    """The call's tensors in order, None for no decay."""
    return [leaves.get(name) for name in ARGUMENTS[case.mixer]]


def recurrence(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole call on one device, token by token."""
    bounds = None if case.documents is None else torch.tensor(case.documents)
    documents = 1 if case.documents is None else len(case.documents) - 1
    filled = [n for n in range(documents) if case.documents is None or case.documents[n] < case.documents[n + 1]]

    def of_documents(x: Tensor) -> Tensor:
        # It enters the document of the first token; all others start from zeros.
        return torch.cat([x if n == filled[0] else torch.zeros_like(x) for n in range(documents)])

    def attend(leaves: dict[str, Tensor]) -> tuple[Tensor, State]:
        if bounds is not None:
            leaves = {name: of_documents(x) if name.startswith("initial") else x for name, x in leaves.items()}
        operator: Any = ALONE[case.mixer]
        out, state = operator(
            *arguments_of(case, leaves),
            scale=case.scale,
            initial_state=initial_of(case, leaves),
            return_state=case.state,
            cu_seqlens=bounds,
            backend="reference",
        )
        if state is not None and bounds is not None:
            last = slice(filled[-1], filled[-1] + 1)
            state = tuple(part[last] for part in state) if case.mixer == "slot" else state[last]
        return out, state

    return with_gradients(case, attend, whole_inputs(case), dtype)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard) -> dict[str, Tensor]:
    """This rank's tokens of whole tensors; what is replicated stays whole."""

    def is_sharded(name: str, x: Tensor) -> bool:
        return name.removeprefix("d") in SHARDED or (name in ("decay", "ddecay") and x.ndim > 1) or name == "dout"

    return {name: shard.split(x, dim=1) if is_sharded(name, x) else x for name, x in whole.items()}


def attend_over_ranks(case: Case, leaves: dict[str, Tensor], shard: SequenceShard) -> tuple[Tensor, State]:
    """The call over ranks."""
    operator: Any = OVER_RANKS[case.mixer]
    return operator(
        *arguments_of(case, leaves),
        shard,
        scale=case.scale,
        initial_state=initial_of(case, leaves),
        return_state=case.state,
        strategy=case.strategy,
    )


def over_ranks(case: Case, dtype: torch.dtype, group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's results of the call over the group, with replicated inputs' gradients summed over the group."""
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)
    # Every rank uses its copy of the state, each with another weight; the weights sum to 1.
    weight = 2 * (shard.rank + 1) / (shard.world * (shard.world + 1))
    inputs = local_parts(whole_inputs(case), shard)
    results = with_gradients(
        case, lambda leaves: attend_over_ranks(case, leaves, shard), inputs, dtype, state_weight=weight
    )
    for name, result in results.items():
        if group is not None and (name.startswith("dinitial") or (name == "ddecay" and case.decay == "head")):
            dist.all_reduce(result, group=group)
    return results


def run(x: dict[str, Tensor], shard: SequenceShard, initial: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Linear attention as most tests call it: with a decay, and with the state after the last token."""
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
