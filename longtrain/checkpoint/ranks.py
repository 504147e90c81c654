"""Ranks that do something together and hear of each other's failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError

from longtrain.errors import UsageError

Result = TypeVar("Result")


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """(rank, world size) in the group; (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    if dist.get_rank(group) < 0:
        raise ValueError("group: got one that this process is not in, expected its members to call this, and no others")
    return dist.get_rank(group), dist.get_world_size(group)


def together(
    action: Callable[[], Result],
    group: dist.ProcessGroup | None,
    what: str,
    *,
    undo: Callable[[], None] | None = None,
) -> list[Result]:
    """Run an action on every rank and return all results; if it fails on one, undo it and raise on all of them.

    No rank raises before all have undone: the first one to raise may end the others. A refusal or an error of the file
    system becomes the same `UsageError` everywhere. Anything else is a defect: it is raised as it is where it happened,
    and as a `RuntimeError` that names the rank on the others.
    """
    rank, world = place(group)
    failure: Exception | None = None
    result: Result | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others wait to hear of it
        failure = error
    if isinstance(failure, OSError | SafetensorError):
        failure = UsageError(f"{what}: {failure}")
    outcome = (str(failure or ""), failure is not None, isinstance(failure, UsageError), result)
    outcomes: list[Any] = [outcome]
    if world > 1:
        outcomes = [None] * world
        dist.all_gather_object(outcomes, outcome, group=group)
    if undo is not None and any(failed for _, failed, _, _ in outcomes):
        undo()
        if world > 1:
            dist.barrier(group)
    for other, (message, failed, usage, _) in enumerate(outcomes):
        if failed and failure is not None and not isinstance(failure, UsageError):
            raise failure
        if failed:
            shared = UsageError(message) if usage else RuntimeError(f"{what}: rank {other} failed: {message}")
            raise shared from failure
    return [result for *_, result in outcomes]
