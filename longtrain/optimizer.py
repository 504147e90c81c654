"""The optimizer and its learning-rate schedule, both from the recipe."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtrain.errors import UsageError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW ("Decoupled Weight Decay Regularization") or plain SGD."""

    name: str = "adamw"
    learning_rate: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves: warm-up, then cosine, or constant with a decay at the end (WSD)."""

    name: str = "cosine"
    warmup: int = 100
    decay: int | None = None
    floor: float = 0.1


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """What step ``step`` (from 1) of ``steps`` multiplies the learning rate by.

    ``cosine`` falls from 1 to ``floor`` along half a cosine; ``wsd`` ("MiniCPM", warm-up-stable-decay) stays at 1 and
    falls linearly to ``floor`` over the last ``decay`` steps (None: a fifth of all steps). A pure function of the step,
    so that a resumed run needs no state.
    """
    if step <= config.warmup:
        return step / config.warmup
    if config.name == "cosine":
        progress = (step - config.warmup) / max(steps - config.warmup, 1)
        return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    decay = max(steps // 5, 1) if config.decay is None else config.decay
    left = min(max(steps - step, 0) / decay, 1.0) if decay else 1.0
    return config.floor + (1 - config.floor) * left


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the model's weights; vectors (norms) and embeddings are not decayed."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    plain = [p for name, p in model.named_parameters() if not (p.ndim >= 2 and "embedding" not in name)]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by name, ``optimizer.<kind>.<parameter>``, made (zero) where no step was taken yet.

    Tensors are the optimizer's own: writing into them restores it.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        return {}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            # Fused AdamW keeps its step count on the parameter's device, everything else expects float32 scalars too.
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        tensors |= {f"optimizer.{kind}.{name}": value for kind, value in state.items()}
    return tensors


def check_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    """Refuse names and numbers that cannot work, naming the recipe's key."""
    if optimizer.name not in ("adamw", "sgd"):
        raise UsageError(f"optimizer.name: got {optimizer.name!r}, expected 'adamw' or 'sgd'")
    if schedule.name not in ("cosine", "wsd"):
        raise UsageError(f"schedule.name: got {schedule.name!r}, expected 'cosine' or 'wsd'")
    for key, value, low, high in (
        ("optimizer.learning_rate", optimizer.learning_rate, 0.0, math.inf),
        ("optimizer.beta1", optimizer.beta1, 0.0, 1.0),
        ("optimizer.beta2", optimizer.beta2, 0.0, 1.0),
        ("optimizer.eps", optimizer.eps, 0.0, math.inf),
        ("optimizer.weight_decay", optimizer.weight_decay, 0.0, math.inf),
        ("schedule.warmup", schedule.warmup, 0, math.inf),
        ("schedule.floor", schedule.floor, 0.0, 1.0 + 1e-12),
    ):
        if not low <= value < high:
            raise UsageError(f"{key}: got {value}, expected a number from {low} up to {high}")
    if schedule.decay is not None and schedule.decay < 0:
        raise UsageError(f"schedule.decay: got {schedule.decay}, expected 0 or more steps")
