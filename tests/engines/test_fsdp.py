"""The fsdp engine's options: copies of the weights, and who is refused what."""

import importlib.util
from unittest import mock

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from longtrain.config import compose
from longtrain.engines import FSDPConfig, FSDPEngine, Setup
from longtrain.errors import UsageError
from longtrain.optimizer import OptimizerConfig
from longtrain.parallel import build_mesh
from tests.distributed import run_distributed
from tests.test_training import assert_same_losses


@pytest.mark.parametrize(("world", "replicas", "data"), [(2, 2, 1), (4, 2, 2)])
def test_copies_of_the_weights_change_no_loss(world: int, replicas: int, data: int) -> None:
    spread = [f"fsdp.replicas={replicas}", f"parallel.data={data}", "memory.shard_blocks=true"]
    assert_same_losses(world, spread, "trainer.sequences=4", "data.length=128")


def small_engine(world: int, replicas: int) -> FSDPEngine:
    torch.manual_seed(0)
    setup = Setup(
        model=torch.nn.Linear(3, 8, bias=False),
        blocks=(),
        mesh=build_mesh("cpu", data=1, sequence=world),
        precision="float32",
        optimizer=OptimizerConfig(name="sgd", learning_rate=1.0, weight_decay=0.0),
        clip=float("inf"),
    )
    return FSDPEngine(setup, FSDPConfig(replicas=replicas))


def placements(rank: int, world: int) -> tuple[tuple, list[int], list[float]]:
    engine = small_engine(world, replicas=2)
    weight = engine.tensors()["model.weight"]
    assert isinstance(weight, DTensor)
    before = weight.full_tensor().detach()
    engine.begin(last=True)
    engine.backward(engine.model(torch.full((1, 3), float(rank))).sum(), torch.tensor(1.0, dtype=torch.float64))
    norm = engine.step(1.0)
    step = before - weight.full_tensor().detach()
    return weight.placements, list(weight.to_local().shape), [float(step[0, 0]), float(norm)]


def test_consecutive_ranks_share_a_copy_and_gradients_are_sums_over_all() -> None:
    for found, shape, (step, norm) in run_distributed(4, placements):
        assert found == (Replicate(), Shard(0)) and shape == [4, 3]
        np.testing.assert_allclose([step, norm], [6.0, 6.0 * 24**0.5], rtol=1e-6)  # 0 + 1 + 2 + 3


def accumulated(rank: int, world: int, replicas: int) -> tuple[list[int] | None, float]:
    """The shape of this rank's gradients after the first of two micro-batches, and the step after both."""
    engine, target = small_engine(world, replicas), torch.tensor(1.0, dtype=torch.float64)
    weight = engine.tensors()["model.weight"]
    assert isinstance(weight, DTensor)
    before, shape = weight.full_tensor().detach(), None
    for value, last in ((rank, False), (10 * rank, True)):
        engine.begin(last=last)
        engine.backward(engine.model(torch.full((1, 3), float(value))).sum(), target)
        if not last and isinstance(weight.grad, DTensor):
            shape = list(weight.grad.to_local().shape)
    engine.step(1.0)
    return shape, float((before - weight.full_tensor().detach())[0, 0])


@pytest.mark.parametrize("replicas", [1, 2])
def test_gradients_of_every_micro_batch_are_cut_at_once(replicas: int) -> None:
    for shape, step in run_distributed(4, accumulated, replicas):
        assert step == pytest.approx(66.0)  # 0 + 1 + 2 + 3, once and ten times
        assert shape == ([2, 3] if replicas == 1 else None)  # over replicas they wait, cut, for the last one's


def eight_bits(rank: int, world: int) -> tuple[bool, float, float]:
    """Whether state is in 8 bits, how far its steps are from AdamW's, and those of a resumed copy from its own."""
    mesh, target = build_mesh("cpu", data=1, sequence=world), torch.tensor(1.0, dtype=torch.float64)

    def engine(adam: str) -> FSDPEngine:
        torch.manual_seed(0)
        model = torch.nn.Linear(256, 32 * world, bias=False)
        config = OptimizerConfig(name="adamw", adam=adam, learning_rate=1e-3)
        setup = Setup(model=model, blocks=(), mesh=mesh, precision="float32", optimizer=config, clip=float("inf"))
        return FSDPEngine(setup)

    def steps(engine: FSDPEngine, numbers: range) -> torch.Tensor:
        for number in numbers:
            x = torch.randn(8, 256, generator=torch.Generator().manual_seed(number))
            engine.begin(last=True)
            engine.backward(engine.model(x).square().sum(), target)
            engine.step(1.0)
        weight = engine.tensors()["model.weight"]
        assert isinstance(weight, DTensor)
        return weight.full_tensor().detach()

    ours, fused, resumed = engine("8bit"), engine("fused"), engine("8bit")
    # A compiler for so few numbers would take a minute.
    with mock.patch.object(torch, "compile", lambda function, fullgraph, dynamic: function):
        start = steps(ours, range(0))
        moved, wanted = steps(ours, range(4)) - start, steps(fused, range(4)) - start
        tensors = resumed.tensors()
        for name, value in ours.tensors().items():
            tensors[name].detach().copy_(value.detach())
        resumed.loaded(tensors)
        middle = steps(ours, range(0))
        assert torch.equal(steps(resumed, range(0)), middle)
        further, again = steps(ours, range(4, 6)) - middle, steps(resumed, range(4, 6)) - middle
    state = next(iter(ours.optimizers.parts[0][0].state.values()))["exp_avg"]
    far, apart = (moved - wanted).norm() / wanted.norm(), (again - further).norm() / further.norm()
    return hasattr(state.to_local(), "codes"), float(far), float(apart)


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao (pip install torchao)")
def test_8bit_adam_moves_as_adamw_does_and_is_resumed() -> None:
    for quantized, far, apart in run_distributed(2, eight_bits):
        assert quantized
        assert 0 < far < 0.1  # a state of 8 bits, in blocks of 256
        assert apart < 0.05  # what is read from a checkpoint is rounded to 8 bits once more; from zero it would be 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optimizer.adam=4bit"], "optimizer.adam: got '4bit', expected 'fused' or '8bit'"),
        (["optimizer.adam=8bit", "optimizer.name=sgd"], "optimizer.adam: got '8bit' with optimizer.name=sgd"),
        (["optimizer.adam=8bit", "engine=deepspeed"], "optimizer.adam: "),
        (["fsdp.replicas=0"], "fsdp.replicas: got 0, expected 1 or more"),
        (["fsdp.replicas=3"], "fsdp.replicas: got 3, it must divide the 2 processes: 1, 2"),
        (["fsdp.replica=2"], "fsdp.replica: no such key (nearest: 'fsdp.replicas')"),
        (["fsdp.cpu_offload=maybe"], "fsdp.cpu_offload: got 'maybe', expected true or false"),
    ],
)
def test_refusals(overrides: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose("quickstart", overrides)
    assert str(refused.value).startswith(said), str(refused.value)
