"""The registered operators whose results recompute can keep, by the short names that recipes use.

Where messages are part of an operator, keeping its results is what spares backward the messages: attention's
(out, lse), the scans' outputs and states, what was moved to another layout. Of a convolution only the halo is kept, a
few tokens that travelled; its output is computed again from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

from longtrain.errors import nearest
from longtrain.parallel import conv1d

Results = Any
"""What an operator returns: a tensor, or a tuple of tensors and lists of tensors."""


def _whole(results: Results) -> Results:
    return results


def _as_kept(kept: Results, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    return kept


@dataclass(frozen=True)
class Operator:
    """An operator and what is kept of it.

    keep: takes the tensors to keep from its results. give: makes the results from these and the operator's arguments.
    """

    name: str
    overload: OpOverload
    keep: Callable[[Results], Results] = _whole
    give: Callable[[Results, tuple[Any, ...], dict[str, Any]], Results] = _as_kept


def _give_convolution(kept: Results, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    (halo,) = kept
    options = {name: kwargs[name] for name in ("shard", "activation", "backend")}
    return conv1d.convolved_again(*args, halo=halo, **options), [halo]


def _nothing(results: Results) -> Results:
    return ()


def _give_shape(kept: Results, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    return args[0].new_zeros(()).expand(args[0].shape)


LAST = Operator("tiled_mlp", torch.ops.longtrain.tiled_mlp.default, _nothing, _give_shape)
"""The tiled half of a block. Nothing of the block follows it, so recompute only needs its inputs, which its backward
reads: it is not run again, and something of its result's shape stands for that."""

_NAMESPACE = "longtrain"
_MIXERS = ("attention", "linear_attention", "delta_rule", "slot_attention")
_MOVES = ("relayout", "gather", "pick", "fetch")

DISTRIBUTED = {
    **{name: Operator(name, getattr(torch.ops.longtrain, f"sequence_parallel_{name}").default) for name in _MIXERS},
    "conv1d": Operator(
        "conv1d", torch.ops.longtrain.sequence_parallel_conv1d.default, lambda results: results[1], _give_convolution
    ),
    **{name: Operator(name, getattr(torch.ops.longtrain, name).default) for name in _MOVES},
}
"""Every operator of forward that sends messages, by short name: what the policy `attention` keeps."""


def operators_named(name: str) -> list[Operator]:
    """The operators that a recipe calls by this name: a short one, or a registered one such as ``aten::mm``.

    Raises:
        ValueError: there is none (the nearest is given), or keeping its results would not spare computing them.
    """
    if isinstance(name, str) and name in DISTRIBUTED:
        return [DISTRIBUTED[name]]
    registered = {full.split(".")[0] for full in torch._C._dispatch_get_all_op_names()} if "::" in str(name) else set()
    if not isinstance(name, str) or name not in registered:
        raise ValueError(
            f"no operator {name!r}{nearest(str(name), [*DISTRIBUTED, *sorted(registered)])}; there are "
            f"{', '.join(DISTRIBUTED)}, and torch's by full name, such as aten::mm"
        )
    namespace, _, rest = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), rest)
    found = [getattr(packet, overload) for overload in packet.overloads()]
    if all(_aliases(overload) for overload in found):
        raise ValueError(f"operator {name!r} writes to its arguments or returns views of them: keeping spares nothing")
    return [
        DISTRIBUTED.get(rest.removeprefix("sequence_parallel_"), Operator(name, overload))
        if namespace == _NAMESPACE
        else Operator(name, overload)
        for overload in found
        if not _aliases(overload)
    ]


def _aliases(overload: OpOverload) -> bool:
    schema = overload._schema
    return schema.is_mutable or any(value.alias_info is not None for value in schema.returns)
