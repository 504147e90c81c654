"""The position-wise half of a block by tiles of tokens: the public operator."""

from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.dispatch import choose_backend
from longtrain.kernels.precision import without_autocast
from longtrain.kernels.tiled_mlp import operators, reference

__all__ = ["tiled_mlp"]


def tiled_mlp(
    x: Tensor,
    norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tile: int,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """``x + down(silu(gate(n)) * up(n))`` with ``n = rms_norm(x) * norm``, a tile of tokens at a time.

    (The feed-forward layer of "GLU Variants Improve Transformer", Shazeer 2020, equation 6, with its norm and residual;
    tiles as in "Arctic Long Sequence Training", Bekman et al. 2025, section 3.1.)

    x [..., D], norm [D], gate_up [2 M, D] (gate first), down [D, M], all in one dtype -> [..., D]. Backward keeps the
    inputs only and computes each tile again. The gradients of the weights are summed over tiles in float32 (float64 for
    float64) and given once, so that hooks on weights run once; nothing is sent, so that ranks may have any number of
    tiles, none too.

    tile: tokens of a tile, at least 1. Beyond inputs and results, memory is that of one tile, 9 M tile numbers, and
        float32 gradients of the weights.
    eps: added to the mean square, at least 0.
    backend: "auto", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, backends.
    """
    checks.floating_channels("x", x, "[..., D]")
    checks.sizes("norm", checks.floating("norm", norm, "[D]"), (x.shape[-1],), "[D]")
    checks.sizes("down", checks.floating("down", down, "[D, M]"), (x.shape[-1], None), "[D, M]")
    wanted = (2 * down.shape[1], x.shape[-1])
    checks.sizes("gate_up", checks.floating("gate_up", gate_up, "[2 M, D]"), wanted, "[2 M, D]")
    checks.same_device(x=x, norm=norm, gate_up=gate_up, down=down)
    for name, weight in (("norm", norm), ("gate_up", gate_up), ("down", down)):
        if weight.dtype != x.dtype:
            raise ValueError(f"{name}: got dtype {weight.dtype}, expected that of x, {x.dtype}")
    if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
        raise ValueError(f"tile: got {tile!r}, expected a number of tokens from 1 on")
    small = checks.number("eps", eps)
    if small is None or small < 0:
        raise ValueError(f"eps: got {eps!r}, expected a number of at least 0")
    if choose_backend("tiled_mlp", backend, device=x.device) == "reference":
        with without_autocast(x.device):
            return reference.mlp(x, norm, gate_up, down, eps=small)
    return operators.forward(x, norm, gate_up, down, eps=small, tile=tile)
