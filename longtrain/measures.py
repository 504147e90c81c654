"""Numbers about a step that modules leave behind: found by themselves, summed over micro-batches, layers and ranks.

A module that has some names them in ``measures`` and puts a pair (sum, weight) for each into ``measured`` in every
forward pass: this rank's part of a mean. The mean is the sum of the sums over the sum of the weights, whoever has them,
so it does not depend on how the step is cut. What backward computes again leaves nothing that counts: pairs are taken
right after the forward pass.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Measures:
    """What the modules of a model measure; without such modules there is nothing to do, and nothing is done.

    names: ``<module.name>.<measure>``, sorted, the same on all ranks.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        found: list[tuple[str, str, Any]] = [
            (f"{module.name}.{measure}", measure, module)
            for module in modules
            for measure in getattr(module, "measures", ())
        ]
        self.names = tuple(sorted({name for name, _, _ in found}))
        self._places = [(self.names.index(name), measure, module) for name, measure, module in found]
        self._taken: list[tuple[int, float | Tensor, float | Tensor]] = []

    def take(self) -> None:
        """After a forward pass: what it has left behind."""
        self._taken += [(place, *module.measured[measure]) for place, measure, module in self._places]

    def sums(self, device: torch.device) -> Tensor:
        """This rank's sums and weights since the last call, float64 ``[names, 2]`` on a device."""
        total = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)
        for place, *pair in self._taken:
            numbers = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in pair]
            total[place] += torch.stack(numbers)
        self._taken = []
        return total
