"""RMS norm as a module: its input is what it keeps for backward."""

import torch
from torch import Tensor, nn

from longtrain.kernels import rms_norm


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension ("Root Mean Square Layer Normalization").

    The weight may have another dtype than x, as under autocast; y has x's.
    """

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps=eps)
