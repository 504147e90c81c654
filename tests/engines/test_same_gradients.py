"""One SGD step gives every weight the same gradient, whoever shards what, however spread and however recomputed.

SGD, and not Adam, which hides a gradient's scale. The gradients to compare with are those of plain autograd on one
process.
"""

from functools import cache
from typing import Any

import pytest
import torch

from longtrain.data import IGNORE
from longtrain.parallel import SequenceShard
from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)
from tests.distributed import run_distributed
from tests.engines.cases import MASKS, RATE, GivenSequences, small_model, trainer_of, weights_of

AXES: dict[str, list[Any]] = {
    "engine": ["fsdp", "fsdp:2", "zero0", "zero1", "zero2", "zero3"],
    "sequence": [1, 2, 4],
    "data": [1, 2],
    "accumulation": [1, 2],
    "masks": list(MASKS),
    "recompute": ["none", "full", "attention", "mixers"],
    "tile": [None, 4],
    "shard_blocks": [True, False],
}
# Recomputed by mixer: each layer's policy is its own.
BY_MIXER = {"lightning": "full", "softmax": "attention"}


def gradients(rank: int, world: int, case: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every weight as one step of this rate shows it."""
    before = {name: p.detach().clone() for name, p in small_model().named_parameters()}
    trainer = trainer_of(
        world,
        case["engine"],
        data=case["data"],
        accumulation=case["accumulation"],
        masks=case["masks"],
        recompute=BY_MIXER if case["recompute"] == "mixers" else case["recompute"],
        tile=case["tile"],
        shard_blocks=case["shard_blocks"],
    )
    result = trainer.train_step()
    weights = weights_of(trainer)
    trainer.close()
    return result.loss, {name: (before[name] - weight) / RATE for name, weight in weights.items()}


@cache
def plain_gradients(masks: str) -> tuple[float, dict[str, torch.Tensor]]:
    """The same without trainer, engine and group: the sum over all tokens of all sequences over their number."""
    model, total, valid = small_model(), torch.zeros(()), 0
    for made in GivenSequences(masks).made:
        shard = SequenceShard(length=len(made.tokens), cu_seqlens=torch.from_numpy(made.cu_seqlens))
        labels = torch.from_numpy(made.labels)[None]
        losses = model(torch.from_numpy(made.tokens)[None], shard, labels)
        assert isinstance(losses, torch.Tensor)
        total, valid = total + losses.sum(), valid + int((labels != IGNORE).sum())
    (total / valid).backward()
    return float(total.detach()) / valid, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(case: dict[str, Any]) -> None:
    loss, wanted = plain_gradients(case["masks"])
    for found_loss, found in run_distributed(case["sequence"] * case["data"], gradients, case, timeout=120):
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            error = float((found[name] - gradient).norm() / gradient.norm())
            assert error < 1e-5, (name, error)


def _with_few_processes(case: dict[str, Any]) -> bool:
    world = case["sequence"] * case["data"]
    return (world < 8 or case["engine"] == "fsdp") and not (case["engine"] == "fsdp:2" and world == 1)


def _with_eight_processes(case: dict[str, Any]) -> bool:
    return case["engine"] != "fsdp"


@cover(AXES, _with_few_processes)
def test_gradients_are_the_same(case: dict[str, Any]) -> None:
    assert_same_gradients(case)


@pytest.mark.full
@cover(AXES | {"sequence": [4], "data": [2]}, _with_eight_processes)
def test_gradients_are_the_same_on_eight_ranks(case: dict[str, Any]) -> None:
    assert_same_gradients(case)
