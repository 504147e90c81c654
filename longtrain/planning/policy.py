"""What of each layer is kept for backward and what is computed again, as plans count it."""

from typing import Any

from longtrain.planning.work import Shape


def policy_of(shape: Shape, index: int) -> str:
    """ "none", "full" or "attention" of a layer; lists of operators count as "attention"."""
    given: Any = shape.recipe.memory.recompute
    if isinstance(given, dict):
        given = given.get(shape.layers[index].name, given.get("default", "none"))
    return given if isinstance(given, str) else "attention"


def policies(shape: Shape) -> list[str]:
    return [policy_of(shape, index) for index in range(len(shape.layers))]


def recomputed(shape: Shape) -> list[float]:
    """How many forward passes of each layer are computed again in backward: 0 or 1."""
    return [0.0 if policy == "none" else 1.0 for policy in policies(shape)]


def kept_mixers(shape: Shape) -> list[bool]:
    """Whether what the mixer of each layer took messages for is kept, and so not computed again."""
    return [policy != "full" for policy in policies(shape)]
