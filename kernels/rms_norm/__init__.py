"""The RMS norm of each token: the public operator."""

from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.rms_norm import operators, reference

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, backend: str = "auto") -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    ("Root Mean Square Layer Normalization", Zhang and Sennrich 2019, equation 4.)

    x [..., D], weight [D] or None -> [..., D] in x's dtype. Dtypes may differ; where one is float64 all is computed in
    float64, otherwise in float32. A gradient has its tensor's dtype. Backward keeps x, the weight and one number for
    each token.

    eps: added to the mean square, at least 0.
    backend: "auto", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, backends.
    """
    checks.floating_channels("x", x, "[..., D]")
    if x.shape[-1] < 1:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., D] with D >= 1")
    if weight is not None:
        checks.floating("weight", weight, "[D]")
        checks.sizes("weight", weight, (x.shape[-1],), "[D]")
    checks.same_device(x=x, weight=weight)
    small = checks.number("eps", eps)
    if small is None or small < 0:
        raise ValueError(f"eps: got {eps!r}, expected a number of at least 0")
    if choose_backend("rms_norm", backend, device=x.device) == "reference":
        with without_autocast(x.device):
            return reference.rms_norm(x, weight, eps=small)
    y, _ = operators.forward(x, weight, eps=small)
    return y
