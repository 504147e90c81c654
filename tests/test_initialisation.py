"""What a model begins with, made a part at a time: the numbers that it has when it is made whole, and less memory."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from longtrain.config import compose
from longtrain.data import Sequences, build_data
from longtrain.engines.base import give_memory, named_tensors
from longtrain.initialisation import shapes_and_values
from longtrain.layers.mixers import MIXERS
from longtrain.layers.pattern import LayersConfig, with_strategy
from longtrain.model import KEEP_EVERYTHING, Decoder, ModelConfig
from longtrain.parallel import SequenceShard, build_mesh
from longtrain.recipe import Recipe, model_vocabulary
from longtrain.train import Processes, build_trainer
from longtrain.trainer import Trainer
from tests.distributed import run_distributed
from tests.memory.allocations import allocated

CPU = torch.device("cpu")


def _made_by_parts(config: ModelConfig, layers: LayersConfig, *, weights: bool = True) -> Decoder:
    sizes: dict[str, Any] = {"vocabulary": 61, "memory": KEEP_EVERYTHING}
    model, values = shapes_and_values(config, layers, **sizes, seed=5, device=CPU, weights=weights)
    give_memory(model, build_mesh("cpu", data=1, sequence=1))
    tensors = named_tensors(model)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
        for name, value in values():
            tensors[name].copy_(value)
    return model


def _check_mixers(rank: int, world: int) -> None:
    for tie in (False, True):
        for name in MIXERS:
            config, layers = ModelConfig(width=64, depth=2, tie_embedding=tie), LayersConfig(pattern=name)
            torch.manual_seed(5)
            whole = Decoder(config, layers, vocabulary=61)
            by_parts = _made_by_parts(config, layers)
            assert (by_parts.head.weight is by_parts.embedding.weight) == tie
            expected, found = named_tensors(whole), named_tensors(by_parts)
            assert expected.keys() == found.keys()
            for tensor in expected:
                assert torch.equal(found[tensor], expected[tensor]), (name, tensor)
            tokens, shard = torch.arange(40)[None], SequenceShard(40)
            assert torch.equal(by_parts(tokens, shard), whole(tokens, shard)), name
            buffers = {name for name, _ in whole.named_buffers()}
            for tensor, value in named_tensors(_made_by_parts(config, layers, weights=False)).items():
                assert torch.equal(value, expected[tensor]) if tensor in buffers else value.isnan().all(), (
                    name,
                    tensor,
                )


def test_every_mixer_begins_as_when_it_is_made_whole() -> None:
    run_distributed(1, _check_mixers)


def _recipe(world: int, overrides: list[str]) -> Recipe:
    data = ["data=copy", "data.vocabulary=512", "data.items=8", "data.selective=false", "data.length=64"]
    return compose("quickstart", [f"launch.processes={world}", "model.depth=3", *data, *overrides])


def _trainer_of(recipe: Recipe, data: Sequences, rank: int, world: int) -> Trainer:
    os.environ.setdefault("LOCAL_RANK", "0")  # train.py sets it for a process without a launcher
    mesh = build_mesh("cpu", data=1, sequence=world)
    return build_trainer(recipe, Processes(rank, world, mesh, CPU), data)


def _begun(rank: int, world: int, overrides: list[str]) -> dict[str, Tensor]:
    recipe = _recipe(world, overrides)
    trainer = _trainer_of(recipe, build_data(recipe.data, seed=recipe.seed)[0], rank, world)
    if world == 1:  # and as it is made whole
        torch.manual_seed(recipe.seed)
        layers = with_strategy(recipe.layers, recipe.parallel.strategy)
        model = Decoder(recipe.model, layers, vocabulary=model_vocabulary(recipe))
        whole = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    else:
        whole = {}
    found = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in trainer.tensors().items()
        if name.startswith("model.")
    }
    assert not whole or all(torch.equal(found[name], whole[name]) for name in whole)
    return found


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, []),
        (3, ["memory.shard_blocks=false"]),
        (2, ["trainer.precision=bfloat16", "model.tie_embedding=false"]),
        (2, ["engine=deepspeed", "deepspeed.stage=3"]),
        (2, ["engine=deepspeed", "deepspeed.stage=3", "trainer.precision=bfloat16", "model.tie_embedding=false"]),
        (2, ["engine=deepspeed", "deepspeed.stage=2", "trainer.precision=bfloat16"]),
    ],
)
def test_any_number_of_ranks_and_any_engine_begins_with_the_same_numbers(world: int, overrides: list[str]) -> None:
    model = [change for change in overrides if change.startswith("model.")]
    (alone,) = run_distributed(1, _begun, model)
    for found in run_distributed(world, _begun, overrides):
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(found[name].float(), value), name


def _building(rank: int, world: int, overrides: list[str]) -> tuple[int, int, int]:
    """Most bytes while a trainer is made, of a block in float32 and of the model."""
    recipe = _recipe(world, ["model.depth=12", "model.width=128", "memory.shard_blocks=true", *overrides])
    data, _ = build_data(recipe.data, seed=recipe.seed)
    made: list[Any] = []
    peak = allocated(lambda: made.append(_trainer_of(recipe, data, rank, world))).peak
    with torch.device("meta"):
        model = Decoder(recipe.model, recipe.layers, vocabulary=512)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    return peak, 4 * block, 4 * sum(p.numel() for p in model.parameters())


def test_no_rank_holds_the_whole_model() -> None:
    for peak, block, model in run_distributed(4, _building, []):
        assert model > 10 * block
        assert peak < model / 4 + 3 * block
