"""Schedules, who optimizes what, and Muon on sharded weights."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from longtrain.layers.pattern import LayersConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.muon import Muon, orthogonalised
from longtrain.optimizer import OptimizerConfig, Optimizers, ScheduleConfig, learning_rate_factor
from tests.distributed import run_distributed


def test_cosine_rises_to_one_and_falls_to_the_floor() -> None:
    schedule = ScheduleConfig(name="cosine", warmup=10, floor=0.1)
    factors = [learning_rate_factor(schedule, step, 110) for step in range(1, 111)]
    assert factors[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert factors[59] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert sorted(factors[9:], reverse=True) == factors[9:]


def test_wsd_stays_and_then_decays_in_a_line() -> None:
    schedule = ScheduleConfig(name="wsd", warmup=2, decay=4, floor=0.0)
    factors = [learning_rate_factor(schedule, step, 10) for step in range(1, 11)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    constant = ScheduleConfig(name="wsd", warmup=0, decay=0)
    assert {learning_rate_factor(constant, step, 7) for step in range(1, 8)} == {1.0}


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (5, 31)])
def test_orthogonalised_keeps_singular_vectors_and_evens_values_out(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inside = u.mT @ orthogonalised(x) @ vh.mT
    values = inside.diagonal()
    assert ((values > 0.5) & (values < 1.3)).all()
    torch.testing.assert_close(inside, torch.diag(values), rtol=0, atol=1e-9)
    assert (orthogonalised(torch.zeros(shape)) == 0).all()


def steps(weights: list[nn.Parameter], gradients: list[list[Tensor]]) -> None:
    optimizer = Muon(weights, lr=0.1, momentum=0.9, weight_decay=0.2)
    for of_step in gradients:
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = gradient
        optimizer.step()


SHAPES = [(7, 4), (2, 9), (6, 6), (1, 3), (12, 5)]  # more rows than ranks and fewer, divisible and not


def data() -> tuple[list[Tensor], list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    weights, *gradients = ([torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(4))
    return weights, gradients


def plain_steps() -> list[Tensor]:
    weights, gradients = data()
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    steps(parameters, gradients)
    return [parameter.detach() for parameter in parameters]


def sharded_steps(rank: int, world: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world,))
    weights, gradients = data()
    parameters = [nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)])) for weight in weights]
    steps(parameters, [[distribute_tensor(g, mesh, [Shard(0)]) for g in of_step] for of_step in gradients])
    return [parameter.full_tensor().detach() for parameter in parameters]  # type: ignore[attr-defined]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_muon_is_the_same_on_sharded_weights(world: int) -> None:
    wanted = plain_steps()
    for found in run_distributed(world, sharded_steps):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_follows_torchs_own() -> None:
    weights, gradients = data()
    theirs = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = torch.optim.Muon(theirs, lr=0.1, momentum=0.9, weight_decay=0.2)
    for of_step in gradients:
        for parameter, gradient in zip(theirs, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for found, their, weight in zip(plain_steps(), theirs, weights, strict=True):
        step, wanted = found - weight, their.detach() - weight
        # torch's iterates in bfloat16, whose steps are 2^-8.
        assert (step - wanted).norm() / wanted.norm() < 5 * 2**-8


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match=r"params: got a weight of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


@pytest.mark.parametrize(("name", "kinds"), [("adamw", {"AdamW"}), ("muon", {"AdamW", "Muon"}), ("sgd", {"SGD"})])
def test_every_weight_has_one_optimizer_and_only_matrices_decay(name: str, kinds: set[str]) -> None:
    layers = LayersConfig(pattern=["lightning", "softmax", "mamba2"])
    model = Decoder(ModelConfig(width=32, depth=3), layers, vocabulary=11)
    optimizers = Optimizers(OptimizerConfig(name=name, weight_decay=0.3), model)
    assert {type(optimizer).__name__ for optimizer, _ in optimizers.parts} == kinds
    owner = {}
    for optimizer, _ in optimizers.parts:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert parameter not in owner
                owner[parameter] = (type(optimizer).__name__, group["weight_decay"])
    for weight_name, parameter in model.named_parameters():
        kind, decay = owner[parameter]
        is_matrix = parameter.ndim == 2 and "embedding" not in weight_name
        is_filter = parameter.ndim == 3  # the filters of a short convolution
        assert decay == (0.3 if is_matrix or is_filter else 0.0)
        assert kind == ("Muon" if name == "muon" and is_matrix and "blocks" in weight_name else min(kinds - {"Muon"}))


def test_state_is_there_before_the_first_step_and_restores() -> None:
    layers = LayersConfig(pattern=["softmax"])
    model = Decoder(ModelConfig(width=32, depth=1), layers, vocabulary=11)
    optimizers = Optimizers(OptimizerConfig(name="muon"), model)
    names = set(optimizers.tensors())
    assert "optimizer.momentum.blocks.0.mixer.qkv.weight" in names
    assert {"optimizer.step.norm.weight", "optimizer.exp_avg.norm.weight", "optimizer.exp_avg_sq.norm.weight"} <= names
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.5)
    assert set(optimizers.tensors()) == names
    assert all(float(value.norm()) > 0 for value in optimizers.tensors().values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {group["lr"] for optimizer, peak in optimizers.parts for group in optimizer.param_groups} == {0.01, 1.5e-4}
