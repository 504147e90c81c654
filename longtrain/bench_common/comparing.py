"""How far one side's results are from another's, also where several ranks hold a part each."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

# The dtype that tells what a dtype loses; float32 for half precision.
WIDER = {torch.float32: torch.float64}

Squares = Mapping[str, list[float]]


def squares(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Per result the squared norm of its difference from the truth, and that of the truth, summed in float64.

    They add up over ranks that hold different tokens; see `deviations`.
    """
    sums = {}
    for name in results.keys() | truth.keys():  # a name that only one of them has is a KeyError
        mine, wanted = results[name], truth[name].to(results[name].device, torch.float64)
        if mine.shape != wanted.shape:  # which would be broadcast
            raise ValueError(f"{name}: got shape {list(mine.shape)}, expected {list(wanted.shape)}")
        sums[name] = [float((mine.double() - wanted).square().sum()), float(wanted.square().sum())]
    return {name: sums[name] for name in results}


def deviations(*ranks: Squares) -> dict[str, float]:
    """The relative error of each result: norm of the difference over norm of the truth, over all ranks."""
    sums = {name: [sum(rank[name][n] for rank in ranks) for n in range(2)] for name in ranks[0]}
    return {name: _ratio(difference, truth) for name, (difference, truth) in sums.items()}


def _ratio(difference: float, truth: float) -> float:
    if truth == 0:  # a result that has to be zero
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / truth)
