"""The optimizer and its learning-rate schedule, both from the recipe."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from longtrain.errors import UsageError
from longtrain.muon import Muon


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW ("Decoupled Weight Decay Regularization"), Muon for the blocks' matrices beside it, or plain SGD."""

    name: str = "adamw"
    adam: str = "fused"
    learning_rate: float = 3e-4
    matrix_learning_rate: float = 0.02
    momentum: float = 0.95
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


class Optimizers:
    """The optimizers of a model, each over its own weights, behind one face.

    ``adamw`` and ``sgd`` take all weights; vectors (norms) and embeddings are not decayed. ``muon`` gives the matrices
    inside the blocks to Muon and leaves embedding, head and norms to AdamW, as its authors advise.
    """

    def __init__(self, config: OptimizerConfig, model: nn.Module) -> None:
        self.model = model
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = {name for name, p in named if p.ndim >= 2 and "embedding" not in name}
        # A stack of short filters, [C, 1, width], is no matrix that could be made orthogonal.
        flat = {name for name, p in named if name in matrices and p.ndim == 2 and "blocks." in name}
        for_muon = flat if config.name == "muon" else set()
        decayed = [p for name, p in named if name in matrices - for_muon]
        plain = [p for name, p in named if name not in matrices]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        rate = config.learning_rate
        if config.name == "sgd":
            self.parts: list[tuple[torch.optim.Optimizer, float]] = [(torch.optim.SGD(groups, lr=rate), rate)]
            return
        betas, eps = (config.beta1, config.beta2), config.eps
        if config.adam == "8bit":
            self.parts = [(_import_torchao().AdamW8bit(groups, lr=rate, betas=betas, eps=eps), rate)]
        else:
            self.parts = [(torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True), rate)]
        if for_muon:
            rate = config.matrix_learning_rate
            weights = [p for name, p in named if name in for_muon]
            muon = Muon(weights, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay)
            self.parts.append((muon, rate))

    def step(self, rate_factor: float) -> None:
        """Move the weights, at each optimizer's peak rate times ``rate_factor``; drop gradients."""
        self.set_rate(rate_factor)
        for optimizer, _ in self.parts:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def set_rate(self, rate_factor: float) -> None:
        """The next step's rates: each optimizer's peak rate times ``rate_factor``."""
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # torchao's, whose compiled step would be made anew for each number
                    group["lr"].fill_(peak * rate_factor)
                else:
                    group["lr"] = peak * rate_factor

    def as_one(self) -> torch.optim.Optimizer:
        """One optimizer over all weights, that steps these; it shares their groups and takes over their state."""
        return self.parts[0][0] if len(self.parts) == 1 else _Joint([optimizer for optimizer, _ in self.parts])

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, ``optimizer.<kind>.<parameter>``, made (zero) where no step was taken yet.

        Tensors are the optimizers' own, and writing into them restores it; but those in 8 bits are shown as float32
        copies, which `loaded` takes over, rounding them once more.
        """
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        tensors: dict[str, Tensor] = {}
        for optimizer, _ in self.parts:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = state_of(optimizer, parameter)
                shown = {kind: _in_float32(value, parameter) for kind, value in state.items()}
                tensors |= {f"optimizer.{kind}.{names[parameter]}": value for kind, value in shown.items()}
        return tensors

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Take over what was written into the tensors that `tensors` gave."""
        for name, parameter in self.model.named_parameters():
            for optimizer, _ in self.parts:
                for kind, value in optimizer.state.get(parameter, {}).items():
                    if _is_quantized(value):
                        _local(value).copy_(_local(tensors[f"optimizer.{kind}.{name}"]))


def state_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for a parameter, by kind; made (zero) where no step was taken yet."""
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, torch.optim.AdamW):
        # Fused AdamW keeps its step count on the parameter's device, as a float32 scalar.
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    elif not state and isinstance(optimizer, Muon):
        state["momentum"] = torch.zeros_like(parameter)
    elif not state and (new := getattr(optimizer, "_new_buffer", None)) is not None:  # torchao's
        state["step"] = torch.tensor(0.0)
        state["exp_avg"], state["exp_avg_sq"] = new(parameter, True), new(parameter, False)
    return state


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_quantized(state: Tensor) -> bool:
    return hasattr(_local(state), "codes")


def _in_float32(state: Tensor, parameter: Tensor) -> Tensor:
    """A state in 8 bits as float32, sharded as its parameter; any other one as it is."""
    if not _is_quantized(state):
        return state
    whole = torch.zeros_like(parameter, dtype=torch.float32)
    _local(whole).copy_(_local(state).dequantize())
    return whole


def _import_torchao() -> Any:
    try:
        from torchao import optim  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"optimizer.adam: 8bit needs torchao ({error}); `pip install torchao` would do it") from error
    return optim


class _Joint(torch.optim.Optimizer):
    """Several optimizers as one, for who takes only one (DeepSpeed): their groups, their state, their steps."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.parts = [(part, part.param_groups) for part in parts]
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for part, groups in self.parts:
            # DeepSpeed steps one group at a time where it keeps them in host memory, by leaving out the others.
            part.param_groups = [group for group in groups if any(group is asked for asked in self.param_groups)]
            part.step()
            part.param_groups = groups
        return loss


def check_optimizer(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> None:
    """Refuse names and numbers that cannot work, naming the recipe's key."""
    if optimizer.name not in ("adamw", "muon", "sgd"):
        raise UsageError(f"optimizer.name: got {optimizer.name!r}, expected 'adamw', 'muon' or 'sgd'")
    if optimizer.adam not in ("fused", "8bit"):
        raise UsageError(f"optimizer.adam: got {optimizer.adam!r}, expected 'fused' or '8bit'")
    if optimizer.adam == "8bit" and optimizer.name == "sgd":
        raise UsageError("optimizer.adam: got '8bit' with optimizer.name=sgd, which uses no Adam; adamw or muon would")
    if optimizer.adam == "8bit" and importlib.util.find_spec("torchao") is None:
        raise UsageError(
            "optimizer.adam: 8bit needs torchao, which is not installed; `pip install torchao` would do it"
        )
    if schedule.name not in ("cosine", "wsd"):
        raise UsageError(f"schedule.name: got {schedule.name!r}, expected 'cosine' or 'wsd'")
    for key, value, low, high in (
        ("optimizer.learning_rate", optimizer.learning_rate, 0.0, math.inf),
        ("optimizer.matrix_learning_rate", optimizer.matrix_learning_rate, 0.0, math.inf),
        ("optimizer.momentum", optimizer.momentum, 0.0, 1.0),
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
