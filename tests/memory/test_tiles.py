"""Tiles of tokens in a model: the gradients of one tile, whatever wraps the weights and however uneven the shards."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from longtrain.kernels.tiled_mlp import torch_impl
from longtrain.memory import MemoryConfig
from longtrain.parallel import SequenceShard
from tests.distributed import run_distributed
from tests.engines.cases import trainer_of, weights_of
from tests.memory.models import BOUNDS, VOCABULARY, model_of, passes, with_policy
from tests.parallel.comparing import world_group
from tests.test_training import gradients_of, plain_gradients

PATTERN = ("softmax", "lightning", "softmax")
POLICIES: tuple[Any, ...] = ("none", "full", "attention", {"softmax": "attention", "lightning": "none"})


def _close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, wanted in truth.items():
        assert float((found[name] - wanted).norm() / wanted.norm()) < 1e-5, name


def test_any_tile_has_the_gradients_of_no_tile_and_every_policy_the_same() -> None:
    shard = SequenceShard(BOUNDS[-1], cu_seqlens=BOUNDS)
    truth, _ = passes(model_of(MemoryConfig(), pattern=PATTERN), shard)
    for tile in (1, 7, 43, 1000):
        first: dict[str, Tensor] = {}
        for policy in POLICIES:
            found, _ = passes(model_of(with_policy(policy, tile=tile), pattern=PATTERN), shard)
            first = first or found
            assert all(torch.equal(found[name], first[name]) for name in truth), (tile, policy)
        _close(first, truth)


@pytest.mark.parametrize("policy", ["full", "attention"])
def test_recompute_does_not_run_the_tiles_again(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    forward = torch_impl.forward

    def counted(x: Tensor, *weights: Tensor, **options: Any) -> Tensor:
        runs.append(x.shape[0])
        return forward(x, *weights, **options)

    monkeypatch.setattr(torch_impl, "forward", counted)
    shard = SequenceShard(BOUNDS[-1], cu_seqlens=BOUNDS)
    passes(model_of(with_policy(policy, tile=7), pattern=PATTERN), shard)
    assert runs == [BOUNDS[-1]] * len(PATTERN)


@pytest.mark.parametrize(
    ("world", "data", "layout", "accumulation", "recompute"),
    [(1, 1, "contiguous", 2, "attention"), (2, 1, "zigzag", 1, "none"), (4, 2, "striped", 1, "full")],
)
def test_a_step_under_fsdp_has_the_gradients_of_no_tile(
    world: int, data: int, layout: str, accumulation: int, recompute: str
) -> None:
    memory = MemoryConfig(recompute=recompute, tile=11)
    for loss, found in run_distributed(world, gradients_of, data, layout, accumulation, memory, True):
        assert loss == pytest.approx(plain_gradients(True)[0], rel=1e-6)
        _close(found, plain_gradients(True)[1])


def _step(rank: int, world: int, engine: str, memory: MemoryConfig) -> dict[str, Tensor]:
    """What a step takes from the weights."""
    trainer = trainer_of(world, engine, masks="empty", recompute=memory)
    before = weights_of(trainer)
    trainer.train_step()
    trainer.close()
    return {name: before[name] - weight for name, weight in weights_of(trainer).items()}


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_a_step_under_deepspeed_has_the_gradients_of_no_tile(engine: str) -> None:
    wanted = run_distributed(2, _step, "fsdp", MemoryConfig())[0]
    for found in run_distributed(2, _step, engine, MemoryConfig(recompute="attention", tile=3), timeout=240):
        _close(found, wanted)


LENGTH = 5  # over 4 ranks uneven, and with documents that leave a rank without a token


def _sharded(rank: int, world: int, tile: int | None, wrapped: bool) -> dict[str, Tensor]:
    """Gradients summed over ranks of one sequence that is spread over them."""
    model: Any = model_of(with_policy("attention", tile=tile), pattern=PATTERN)
    shard = SequenceShard(LENGTH, world_group() if world > 1 else None, "contiguous")
    seeded = torch.Generator().manual_seed(4)
    tokens, labels = (torch.randint(VOCABULARY, (1, LENGTH), generator=seeded) for _ in range(2))
    labels[:, 3:] = -100
    run = DistributedDataParallel(model) if wrapped else model
    run(shard.split(tokens, dim=1), shard, shard.split(labels, dim=1)).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    for gradient in found.values():
        if world > 1 and not wrapped:
            dist.all_reduce(gradient)
        gradient.mul_(world if wrapped else 1)  # DDP averages
    return found


@cache
def _alone() -> dict[str, Tensor]:
    return _sharded(0, 1, None, False)


def test_uneven_and_empty_shards_and_ddp_have_the_same_gradients() -> None:
    sizes = [SequenceShard.pretend(LENGTH, rank=rank, world=4, layout="contiguous").local_length for rank in range(4)]
    assert len(set(sizes)) > 1
    for world, wrapped in ((4, False), (2, True)):
        for found in run_distributed(world, _sharded, 2, wrapped):
            _close(found, _alone())
