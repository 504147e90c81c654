"""Cross-entropy of a linear head, without its logits: the public operator."""

import torch
from torch import Tensor

from longtrain.kernels import checks
from longtrain.kernels.linear_cross_entropy import operators, reference
from longtrain.kernels.precision import without_autocast

__all__ = ["linear_cross_entropy"]

_REDUCTIONS = ("sum", "mean", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "sum",
    z_loss: float = 0.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The cross-entropy of the logits hidden @ weight^T with targets, while the logits are never held.

        z_nv = sum_d hidden_nd weight_vd,  with a softcap c: c tanh(z_nv / c)
        loss_n = lse_n - z_n,target(n) + z_loss lse_n^2,  lse_n = log sum_v exp(z_nv)

    (Computed by blocks of tokens and vocabulary, as in "Cut Your Losses in Large-Vocabulary Language Models",
    Wijmans et al. 2024, but with every term of the gradients, summed up in float32.)

    hidden [..., D], weight [vocabulary, D], targets int64 [...] -> a number, or [...] with reduction "none", in float32
    (float64 where hidden or weight is float64). hidden and weight are differentiable, through any use of the losses;
    a gradient has its tensor's dtype. Logits are computed again in backward.

    ignore_index: targets that count for nothing: loss 0, gradient 0, whatever their hidden holds.
    reduction: "sum"; "mean" over the targets that count, 0 (not NaN) where none does; or "none", a loss per target.
    z_loss: weight of the squared log of the softmax's denominator, at least 0.
    softcap: bounds the logits, above 0; None does not.
    backend: "auto", "triton", "torch" or "reference"; `longtrain.kernels.explain` tells what runs.

    A NaN or inf in one token's hidden reaches that token's loss and gradient and the gradient of weight, nothing else.
    Beyond inputs and gradients, memory is one tile of logits (at most 8192 x 8192) and a float32 copy of the smaller of
    the two gradients.

    Raises ValueError naming the argument for anything else: shapes, dtypes, devices, backends, and targets that are not
    in the vocabulary (on a GPU, where the check would wait for the device, only under `longtrain.debug.checks()`; the
    loss of such a target is NaN otherwise).
    """
    _check_tensors(hidden, weight, targets)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index: got {ignore_index!r}, expected an integer")
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}, expected one of {', '.join(map(repr, _REDUCTIONS))}")
    extra, cap = checks.number("z_loss", z_loss), checks.number("softcap", softcap, positive=True)
    if extra is None or extra < 0:
        raise ValueError(f"z_loss: got {z_loss!r}, expected a number of at least 0")
    tokens, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if backend == "reference":
        operators.check_targets(wanted, weight.shape[0], ignore_index=ignore_index)
        with without_autocast(hidden.device):
            losses = reference.linear_cross_entropy(
                tokens, weight, wanted, ignore_index=ignore_index, z_loss=extra, softcap=cap
            )
    else:
        losses, _ = operators.forward(
            tokens, weight, wanted, ignore_index=ignore_index, z_loss=extra, softcap=cap, backend=backend
        )
    if reduction == "none":
        return losses.reshape(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (wanted != ignore_index).sum().clamp_min(1)


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Refuse, with a ValueError naming the argument, tensors that do not fit each other."""
    if not isinstance(hidden, Tensor):
        raise ValueError(f"hidden: got {type(hidden).__name__}, expected a tensor [..., D]")
    if hidden.dtype not in checks.FLOATS:
        raise ValueError(f"hidden: got dtype {hidden.dtype}, expected float64, float32, bfloat16 or float16")
    if hidden.ndim < 1 or hidden.shape[-1] < 1:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, expected [..., D] with D >= 1")
    checks.floating("weight", weight, "[vocabulary, D]")
    checks.sizes("weight", weight, (None, hidden.shape[-1]), "[vocabulary, D]")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64:
        given = f"dtype {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets: got {given}, expected an int64 tensor [...]")
    if targets.shape != hidden.shape[:-1]:
        expected = tuple(hidden.shape[:-1])
        raise ValueError(f"targets: got shape {tuple(targets.shape)}, expected that of hidden without D, {expected}")
    checks.same_device(hidden=hidden, weight=weight, targets=targets)
