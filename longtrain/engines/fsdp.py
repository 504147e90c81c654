"""FSDP2: torch's own `fully_shard`. Weights are `DTensor`s sharded by rows, gathered where a block runs."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from longtrain.checkpoint.format import part_of
from longtrain.engines.base import PRECISIONS, Engine, Setup, give_memory, named_tensors
from longtrain.errors import UsageError
from longtrain.optimizer import Optimizers


@dataclass(frozen=True)
class FSDPConfig:
    """Options of the fsdp engine."""

    replicas: int = 1
    cpu_offload: bool = False


class FSDPEngine(Engine):
    """Shards over all ranks, or inside each of ``replicas`` groups of consecutive ranks ("hybrid sharding").

    With ``cpu_offload`` weights, gradients and optimizer state lie in (pinned) host memory, the optimizer steps there,
    and blocks' weights are copied to the device when they run. On a CPU that is where they lie anyway.

    Raises:
        UsageError: the number of replicas does not divide the ranks.
    """

    def __init__(self, setup: Setup, config: FSDPConfig = FSDPConfig()) -> None:
        ranks = _ranks_that_shard(setup.mesh, config.replicas)
        compute = PRECISIONS[setup.precision]
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32
        )
        offload = OffloadPolicy()
        if config.cpu_offload and setup.mesh.device_type != "cpu":
            offload = CPUOffloadPolicy()
        for block in setup.blocks:
            give_memory(block, setup.mesh)  # of one at a time: sharded, it keeps this rank's part
            fully_shard(block, mesh=ranks, mp_policy=policy, offload_policy=offload)
        give_memory(setup.model, setup.mesh)
        self.model = setup.model
        self._sharded = fully_shard(
            setup.model, mesh=ranks, mp_policy=policy, offload_policy=offload, reshard_after_forward=False
        )
        if setup.values is not None:
            _fill(setup.model, setup.values())
        self.optimizers = Optimizers(setup.optimizer, setup.model)
        self._world, self._clip = setup.mesh.size(), setup.clip

    def begin(self, *, last: bool) -> None:
        # Every micro-batch's gradients are cut at once: kept whole until the last they would take 4 bytes a weight on
        # every rank. Only the sum over replicas waits.
        self._sharded.set_requires_all_reduce(last)

    def backward(self, loss: Tensor, valid: Tensor) -> None:
        # fully_shard averages over ranks; the loss is a sum over them.
        (loss * (self._world / valid).to(loss.dtype)).backward()

    def step(self, rate_factor: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._clip if math.isfinite(self._clip) else 1e30)
        self.optimizers.step(rate_factor)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def tensors(self) -> dict[str, Tensor]:
        # After an evaluation the weights are still gathered, and named_parameters() would show those copies.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        named = self.model.named_parameters()
        weights: dict[str, Tensor] = {f"model.{name}": p for name, p in named if p.requires_grad}
        return weights | self.optimizers.tensors()

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        self.optimizers.loaded(tensors)  # weights, and most of the state, are the engine's own tensors


@torch.no_grad()
def _fill(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Take this rank's part of each value, whose name comes with it."""
    tensors = named_tensors(model)
    for name, value in values:
        part = part_of(name, tensors[name])
        part.local.copy_(value[part.offset : part.offset + part.rows])
        del value  # not beside the next one


def check_fsdp(config: FSDPConfig) -> None:
    """Refuse numbers that cannot work, naming the recipe's key."""
    if config.replicas < 1:
        raise UsageError(f"fsdp.replicas: got {config.replicas}, expected 1 or more")


def check_replicas(config: FSDPConfig, processes: int) -> None:
    """Refuse more copies of the weights than so many processes can hold."""
    if processes % config.replicas:
        fits = ", ".join(str(number) for number in range(1, processes + 1) if processes % number == 0)
        raise UsageError(f"fsdp.replicas: got {config.replicas}, it must divide the {processes} processes: {fits}")


def _ranks_that_shard(mesh: DeviceMesh, replicas: int) -> DeviceMesh:
    """All ranks in one row; or (replicate, shard), where consecutive ranks, which lie in one node, share a copy."""
    check_replicas(FSDPConfig(replicas=replicas), mesh.size())
    if replicas == 1:
        return mesh._flatten("everyone") if mesh.ndim > 1 else mesh
    shape = (replicas, mesh.size() // replicas)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
