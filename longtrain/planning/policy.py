"""What of each layer is kept for backward and what is computed again, as plans count it."""

from longtrain.planning.work import Shape


def policy_of(shape: Shape, index: int) -> str:
    """ "none", "full" or "attention" of a layer, "list" for a list of operators."""
    given = shape.policy(index)
    return given if isinstance(given, str) else "list"


def policies(shape: Shape) -> list[str]:
    return [policy_of(shape, index) for index in range(len(shape.layers))]


def recomputed(shape: Shape) -> list[float]:
    """How many forward passes of each layer are computed again in backward: 0 or 1, also of products that are kept."""
    return [0.0 if policy == "none" else 1.0 for policy in policies(shape)]


def kept_mixers(shape: Shape) -> list[bool]:
    """Whether what the mixer of each layer took messages for is kept, and so not computed again."""
    kept = []
    for index, policy in enumerate(policies(shape)):
        if policy == "list":  # its largest results are those of attention and scans
            kept.append(shape.blocks[index].remembered > shape.mixers[index].results / 2)
        else:
            kept.append(policy != "full")
    return kept
