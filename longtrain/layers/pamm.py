"""A projection that remembers few rows of its input."""

import torch
from torch import Tensor, nn

from longtrain.kernels.pamm import pamm_linear


class PammLinear(nn.Linear):
    """A linear layer without bias that keeps `kept` of its N input tokens for backward, see `kernels.pamm`.

    Which tokens is random, from `seed` and N alone: two runs keep the same, and so does one that is resumed. Where
    there are no more tokens than `kept`, or no gradient is recorded, it is ``nn.Linear``.
    """

    def __init__(self, inputs: int, outputs: int, *, kept: int, seed: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.kept, self.seed = kept, seed

    def forward(self, input: Tensor) -> Tensor:
        tokens = input.numel() // max(self.in_features, 1)
        if tokens <= self.kept or not torch.is_grad_enabled():
            return super().forward(input)
        weight = self.weight
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(tokens, generator=generator)[: self.kept]
        return pamm_linear(input, weight, rows)
