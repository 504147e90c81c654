"""A RoPE model of two softmax layers on packed documents, over ranks in every strategy: as on one device."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longtrain.layers import SequenceParallelAttention
from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.parallel import SequenceShard
from tests.distributed import run_distributed

LENGTH, BOUNDS = 45, [0, 1, 9, 9, 30, 45]
SPREADS = (
    ("ring", "zigzag", 1),
    ("ring", "balanced", 1),
    ("ring", "striped", 2),
    ("allgather", "contiguous", 1),
    ("allgather", "striped:3", 2),
    ("ulysses", "zigzag", 1),
    ("mesh", "balanced", 1),
    ("mesh", "zigzag", 2),
    ("auto", "contiguous", 1),
)


def _results(shard: SequenceShard, strategy: str, recompute: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss summed over this rank's tokens, and its gradients."""
    torch.manual_seed(3)
    options: dict[str, Any] = {"heads": 4, "kv_heads": 2, "strategy": strategy}
    layers = LayersConfig(pattern=["softmax"], mixers={"softmax": options})
    config = ModelConfig(width=32, depth=2, tie_embedding=False)
    model = Decoder(config, layers, vocabulary=50, memory=MemoryConfig(recompute=recompute)).double()
    torch.nn.init.normal_(model.head.weight)
    seeded = torch.Generator().manual_seed(4)
    tokens, labels = (torch.randint(50, (1, LENGTH), generator=seeded) for _ in range(2))
    labels[:, 30:] = -100  # ranks with nothing to predict
    loss = model(shard.split(tokens, dim=1), shard, shard.split(labels, dim=1)).sum() / 30
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _check(rank: int, world: int, truth: tuple[Tensor, dict[str, Tensor]]) -> None:
    for number, (strategy, layout, rows) in enumerate(SPREADS):
        group: Any = dist.group.WORLD
        if rows > 1:
            group = init_device_mesh("cpu", (rows, world // rows), mesh_dim_names=("outer", "inner"))
        shard = SequenceShard(LENGTH, group, layout, BOUNDS)
        loss, gradients = _results(shard, strategy, "full" if number % 2 else "none")
        assert gradients.keys() == truth[1].keys()
        for part in (loss, *gradients.values()):
            dist.all_reduce(part)
        assert abs(float(loss / truth[0]) - 1) < 1e-12
        for name, gradient in gradients.items():
            error = float((gradient - truth[1][name]).norm() / truth[1][name].norm())
            assert error < 1e-10, (strategy, layout, name, error)


@pytest.mark.parametrize("world", [2, 4])
def test_loss_and_gradients_are_those_of_one_device(world: int) -> None:
    truth = _results(SequenceShard(LENGTH, None, "contiguous", BOUNDS), "ring", "none")
    run_distributed(world, _check, truth)


def test_dropout_is_refused_with_the_reason() -> None:
    SequenceParallelAttention(dropout=0.0)
    with pytest.raises(ValueError, match=r"dropout: got 0.1, expected 0: .* masks"):
        SequenceParallelAttention(dropout=0.1)
