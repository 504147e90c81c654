"""`memory.recompute` as data: what is kept of each layer for backward.

Four policies, for all layers or by the name of a mixer:

- ``none``: everything that backward uses is kept;
- ``full``: only the layer's input is kept; backward runs the layer again, messages and all ("Training Deep Nets with
  Sublinear Memory Cost");
- ``attention``: the input and the results of operators that send messages are kept, attention's (out, lse) and the
  scans' outputs and states above all, and everything else is computed again: at long sequences nearly all of a layer's
  work is in what is kept, and backward repeats no message;
- a list of operators: the input and their results are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longtrain.errors import UsageError, nearest
from longtrain.layers.pattern import DEFAULT
from longtrain.memory.operators import DISTRIBUTED, Operator, operators_named

KEY = "memory.recompute"
NAMED = ("none", "full", "attention")


@dataclass(frozen=True)
class Policy:
    """What one layer does: nothing is recomputed, or all but the results of `kept`."""

    recompute: bool
    kept: tuple[Operator, ...] = ()
    named: str = ""  # the recipe's key, where `kept` is its list of operators
    seen: set[str] = field(default_factory=set, compare=False)  # names of those that ran in a forward pass


def layer_policies(recompute: Any, layers: Sequence[str]) -> list[Policy]:
    """The policy of each layer.

    recompute: a policy, or a mapping of mixers' names, and ``default``, to policies; without a default the mixers that
        are not named keep everything. layers: the name of each layer's mixer, as the pattern has it.

    Raises:
        ValueError: no such policy, operator or mixer; the text starts with the recipe's key and gives the nearest name.
    """
    if not isinstance(recompute, dict):
        return [_policy(KEY, recompute)] * len(layers)
    if not recompute:
        raise ValueError(f"{KEY}: got an empty mapping, expected policies of mixers such as {{{layers[0]}: attention}}")
    known = list(dict.fromkeys(layers))
    for name in recompute:
        if name not in (*known, DEFAULT):
            raise ValueError(
                f"{KEY}.{name}: no layer has a mixer {name!r}{nearest(str(name), known)}; there are {', '.join(known)} "
                f"and {DEFAULT}"
            )
    policies = {name: _policy(f"{KEY}.{name}", value) for name, value in recompute.items()}
    fallback = policies.get(DEFAULT, Policy(recompute=False))
    return [policies.get(name, fallback) for name in layers]


def _policy(key: str, value: Any) -> Policy:
    if value == "none":
        return Policy(recompute=False)
    if value == "full":
        return Policy(recompute=True)
    if value == "attention":
        return Policy(recompute=True, kept=tuple(DISTRIBUTED.values()))
    if not isinstance(value, list):
        raise ValueError(
            f"{key}: got {value!r}{nearest(str(value), NAMED)}, expected one of {', '.join(NAMED)}, or a list of "
            f"operators whose results are kept, such as [{', '.join(list(DISTRIBUTED)[:2])}]"
        )
    if not value:
        raise ValueError(f"{key}: got an empty list, expected operators to keep; full keeps none of them")
    try:
        found = [operator for name in value for operator in operators_named(name)]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    return Policy(recompute=True, kept=tuple(found), named=key)


def check_seen(policies: Sequence[Policy]) -> None:
    """Refuse, after a forward pass, operators of a list that no layer has run: keeping them keeps nothing.

    Raises:
        UsageError: there is one.
    """
    for key in dict.fromkeys(policy.named for policy in policies if policy.named):
        alike = [policy for policy in policies if policy.named == key]
        seen = set[str]().union(*(policy.seen for policy in alike))
        for operator in alike[0].kept:
            if operator.name not in seen:
                others = f"without it ({', '.join(sorted(seen))}) it would work" if seen else "full keeps none too"
                raise UsageError(f"{key}: got {operator.name}, which no layer under it runs; {others}")
