"""What a mixer can start from: the weights of a trained one of another kind, as data on the mixer that takes them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Takes:
    """What a mixer takes of another one.

    weights: its own parameters' names, and those of the other whose values they take; shapes must be equal, and of the
    other none may be left over. A pair that neither of the two has is no matter. same: attributes that must be equal in
    both, and the option that sets each.
    """

    weights: Mapping[str, str]
    same: Mapping[str, str]


PROJECTIONS = {"qkv.weight": "qkv.weight", "out.weight": "out.weight"}
"""q, k and v in one matrix, query heads first, and the projection of the outputs."""

HEADS = {"heads": "heads", "groups": "kv_heads", "key_width": "head_width"}
"""How these matrices are cut into heads."""
