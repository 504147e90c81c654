"""RMS norm for mixers: torch's, with its weight in the dtype of what it normalises."""

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension ("Root Mean Square Layer Normalization").

    Under autocast x is in half precision and the weight is not, for which torch has no fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
