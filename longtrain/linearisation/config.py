"""The recipe's `linearise` keys."""

import dataclasses
from dataclasses import dataclass

from longtrain.errors import UsageError
from longtrain.optimizer import OptimizerConfig


@dataclass(frozen=True)
class LineariseConfig:
    """Which trained run a model starts from, and how long its new layers match the old ones."""

    from_: str | None = None  # `from` in recipes
    match_steps: int = 0
    match_rate: float = 1.0


def check_linearise(config: LineariseConfig, *, steps: int, engine: str) -> None:
    """Refuse numbers that cannot work, and an engine that would move weights that match nothing.

    steps: those of the run. Whether there is a trained run is looked at when one begins to start from it, not here:
    one that has ended is evaluated without.
    """
    if not 0 <= config.match_steps <= steps:
        raise UsageError(
            f"linearise.match_steps: got {config.match_steps}, expected 0 to trainer.steps = {steps}, of which they are"
        )
    if not 0 < config.match_rate < float("inf"):
        raise UsageError(f"linearise.match_rate: got {config.match_rate}, expected a number above 0")
    if config.match_steps and engine != "fsdp":
        raise UsageError(
            f"engine: got {engine!r} with linearise.match_steps = {config.match_steps}; it decays the weights that get "
            "no gradient while layers are matched: engine=fsdp would work"
        )


def optimizer_while_matching(optimizer: OptimizerConfig, config: LineariseConfig) -> OptimizerConfig:
    """The recipe's optimizer with the learning rates of the first stage."""
    return dataclasses.replace(
        optimizer,
        learning_rate=optimizer.learning_rate * config.match_rate,
        matrix_learning_rate=optimizer.matrix_learning_rate * config.match_rate,
    )
