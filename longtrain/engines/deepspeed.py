"""DeepSpeed's ZeRO ("ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"), stages 0 to 3.

DeepSpeed sees every rank, data and sequence alike, as a data-parallel one, and averages gradients over them all at
every stage. (Told of a sequence group, its stages 1 and 2 scale gradients by world / sequence, its stage 3 by world.)
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from longtrain.engines.base import PRECISIONS, Engine, Setup, give_memory, named_tensors
from longtrain.engines.deepspeed_config import DeepSpeedConfig, Wanted, deepspeed_json, fit_buffers
from longtrain.errors import UsageError
from longtrain.muon import Muon, Slice
from longtrain.optimizer import Optimizers, state_of

DEFAULTS = DeepSpeedConfig()
STEP = "step"  # the one kind of optimizer state that is a number for a whole partition


@dataclass(frozen=True)
class _Place:
    """Where this rank keeps its part of a weight: numbers [start, start + size) of it, inside a flat partition."""

    flat: Tensor  # float32, of many weights
    offset: int
    start: int
    size: int

    def within(self, flat: Tensor) -> Tensor:
        return flat.detach()[self.offset : self.offset + self.size]


class DeepSpeedEngine(Engine):
    """Wraps the model in DeepSpeed's engine, with the recipe's own optimizers inside.

    Its checkpoints hold the same tensors as those of the fsdp engine, so each resumes the other's, at any world size
    and stage. Unlike fsdp, DeepSpeed leaves out a step whose gradients hold inf or NaN; their norm is then inf.

    Raises:
        UsageError: DeepSpeed is not installed, or its configuration contradicts the recipe.
    """

    def __init__(self, setup: Setup, config: DeepSpeedConfig = DEFAULTS) -> None:
        deepspeed = import_deepspeed()
        if setup.values is not None:
            give_memory(setup.model, setup.mesh, hollow=config.stage == 3)
        self.stage = config.stage
        self._mesh = setup.mesh._flatten("everyone") if setup.mesh.ndim > 1 else setup.mesh
        # Checkpoints are put together in host memory.
        self._host = self._mesh if setup.mesh.device_type == "cpu" else init_device_mesh("cpu", (setup.mesh.size(),))
        self._world, self._clip = setup.mesh.size(), setup.clip
        self._parameters = dict(setup.model.named_parameters())
        options = deepspeed_json(
            config, Wanted(precision=setup.precision, clip=setup.clip, accumulation=setup.accumulation)
        )
        fit_buffers(options["zero_optimization"], *_numbers(setup))
        self.optimizers = Optimizers(setup.optimizer, setup.model)
        optimizer = self.optimizers.as_one()
        names = {parameter: name for name, parameter in self._parameters.items()}
        self._groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        self._owners = {
            names[p]: part for part, _ in self.optimizers.parts for group in part.param_groups for p in group["params"]
        }
        exact = self._fill(setup)
        if config.stage == 3 and setup.blocks:
            deepspeed.utils.set_z3_leaf_modules(setup.model, list({type(block) for block in setup.blocks}))
        self._shapes = {name: p.shape for name, p in self._parameters.items()}
        if config.stage == 3 and setup.values is not None:
            _partition(deepspeed, setup, options)
        from pydantic import ValidationError  # which comes with DeepSpeed

        try:
            made = deepspeed.initialize(model=setup.model, optimizer=optimizer, config=options)
        except ValidationError as error:  # of a user's file: what the recipe makes is what DeepSpeed takes
            place, said = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            raise UsageError(f"deepspeed.config: DeepSpeed refuses {place} of {error.title}: {said}") from error
        self._engine, self._zero, *_ = made
        self.model = self._engine
        if config.stage == 3:
            self._gather_with_the_model(deepspeed, setup)
        self._places = {} if config.stage == 0 else self._find_places()
        self._show_slices_to_muon()
        if exact is not None:
            for name, value in exact():
                if (place := self._places.get(name)) is not None:
                    self._write(place.within(place.flat), name, value)
                del value  # not beside the next one
            self._weights_from_float32()

    @torch.no_grad()
    def _fill(self, setup: Setup) -> Callable[[], Iterable[tuple[str, Tensor]]] | None:
        """Set what is given as values; returns those that DeepSpeed's float32 weights must be given in the end.

        It takes them from weights that it has rounded, and of hollow ones there are none.
        """
        rounded, hollow = setup.precision != "float32", self.stage == 3
        if setup.values is None:
            exact = {name: p.detach().cpu() for name, p in self._parameters.items()} if rounded else {}
            return exact.items if rounded else None
        tensors = dict(setup.model.named_buffers()) if hollow else named_tensors(setup.model)
        for name, value in setup.values():
            if name in tensors:
                tensors[name].copy_(value)
            del value  # not beside the next one
        return setup.values if rounded or hollow else None

    def begin(self, *, last: bool) -> None:
        self._last = last
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, valid: Tensor) -> None:
        # DeepSpeed averages over ranks; the loss is a sum over them.
        self._engine.backward(loss * (self._world / valid).to(loss.dtype), scale_wrt_gas=False)
        if not self._last:
            self._engine.step()  # counts the micro-batch

    def step(self, rate_factor: float) -> Tensor:
        self.optimizers.set_rate(rate_factor)
        if self.stage == 0:
            largest = self._clip if math.isfinite(self._clip) else 1e30
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), largest)
            self._engine.step()
            return norm
        self._engine.step()
        return torch.as_tensor(self._engine.get_global_grad_norm())

    def tensors(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return {f"model.{name}": p for name, p in self._parameters.items()} | self.optimizers.tensors()
        tensors: dict[str, Tensor] = {}
        for name, place in self._places.items():
            tensors[f"model.{name}"] = self._rows(place.within(place.flat), name)
            for kind, value in self._state(name).items():
                rows = value.detach().clone() if kind == STEP else self._rows(place.within(value), name)
                tensors[f"optimizer.{kind}.{name}"] = rows
        return tensors

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        if self.stage == 0:
            return
        for name, place in self._places.items():
            self._write(place.within(place.flat), name, _whole(tensors[f"model.{name}"]))
            for kind, value in self._state(name).items():
                read = _whole(tensors[f"optimizer.{kind}.{name}"])
                if kind == STEP:
                    value.copy_(read)
                else:
                    self._write(place.within(value), name, read)
        self._weights_from_float32()

    def _state(self, name: str) -> dict[str, Tensor]:
        """The optimizer's state of the partition that holds a weight."""
        return state_of(self._owners[name], self._places[name].flat)

    def _rows(self, part: Tensor, name: str) -> Tensor:
        """This rank's rows of something shaped like a weight, from this rank's part of its numbers, in host memory."""
        shape, place = self._shapes[name], self._places[name]
        whole = torch.zeros(shape.numel(), dtype=part.dtype, device=self._mesh.device_type)
        whole[place.start : place.start + place.size] = part
        dist.all_reduce(whole, group=self._mesh.get_group())
        rows = -(-shape[0] // self._world)
        first = min(self._mesh.get_local_rank() * rows, shape[0])
        mine = whole.view(shape)[first : first + rows].to("cpu", copy=True)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(mine, self._host, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def _write(self, part: Tensor, name: str, whole: Tensor) -> None:
        """Fill this rank's part of a weight's numbers from all of them."""
        place = self._places[name]
        part.copy_(whole.reshape(-1)[place.start : place.start + place.size])

    def _weights_from_float32(self) -> None:
        """What the model computes with, made anew from the optimizer's weights, as DeepSpeed does after a step."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for number in range(len(self._zero.fp32_partitioned_groups_flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)
        if kept := self._zero.persistent_parameters:
            kept[0].all_gather(kept)

    def _gather_with_the_model(self, deepspeed: Any, setup: Setup) -> None:
        """Weights outside the blocks are there while the model runs, whichever module uses them."""
        inside = {id(parameter) for block in setup.blocks for parameter in block.parameters()}
        for parameter in setup.model.parameters():
            if id(parameter) not in inside:
                deepspeed.zero.register_external_parameter(setup.model, parameter)

    def _find_places(self) -> dict[str, _Place]:
        places = {}
        for flat_number, names in enumerate(self._groups):
            for name in names:
                places[name] = self._place(name, flat_number)
        return places

    def _place(self, name: str, group: int) -> _Place:
        zero, parameter, numbers = self._zero, self._parameters[name], self._shapes[name].numel()
        if self.stage == 3:
            number, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = min(size * self._mesh.get_local_rank(), numbers)
            return _Place(zero.fp32_partitioned_groups_flat[number], offset, start, min(size, numbers - start))
        # Stage 1 in bfloat16 has an optimizer class of its own.
        flats = getattr(zero, "single_partition_of_fp32_groups", None) or zero.fp32_groups_flat_partition
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return _Place(flats[group], 0, 0, 0)
        inside, of_weight = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Place(flats[group], inside.start, of_weight.start, inside.numel)

    def _show_slices_to_muon(self) -> None:
        parts = [part for part, _ in self.optimizers.parts if isinstance(part, Muon)]
        if not self._places or not parts:
            return
        sizes = self._held_sizes()
        for part in parts:
            slices: dict[Tensor, list[Slice]] = {}
            for name, place in self._places.items():
                if self._owners[name] is part:
                    rows, columns = self._shapes[name]
                    held = tuple(of_rank[name] for of_rank in sizes)
                    piece = Slice((rows, columns), place.offset, place.size, held)
                    slices.setdefault(place.flat, []).append(piece)
            part.use_slices(slices, self._mesh.get_group())

    def _held_sizes(self) -> list[dict[str, int]]:
        """How many numbers of each weight each rank holds."""
        sizes: list[Any] = [None] * self._world
        dist.all_gather_object(sizes, {name: place.size for name, place in self._places.items()})
        return sizes


def _partition(deepspeed: Any, setup: Setup, options: dict[str, Any]) -> None:
    """Cut hollow weights into the ranks' shares, block by block: no more than one is whole at a time."""
    compute = PRECISIONS[setup.precision]
    for part in (*setup.blocks, setup.model):
        for parameter in part.parameters():
            if not hasattr(parameter, "ds_id"):
                parameter.data = torch.zeros(parameter.shape, dtype=compute, device=parameter.device)
        deepspeed.zero.Init(module=part, config_dict_or_path=options, dtype=compute)


def import_deepspeed() -> Any:
    """DeepSpeed, told to be quiet and to compile nothing that training has no use for."""
    try:
        import deepspeed
    except ImportError as error:
        raise UsageError(f"engine: deepspeed cannot be imported ({error}); `pip install deepspeed` may help") from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # An all-reduce for inference, 44 s of C++ on a CPU, which would be made at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _numbers(setup: Setup) -> tuple[list[list[int]], list[int]]:
    """Numbers of each block's weights, and of those outside of blocks."""
    inside = {id(p) for block in setup.blocks for p in block.parameters()}
    blocks = [[p.numel() for p in block.parameters()] for block in setup.blocks]
    return blocks, [p.numel() for p in setup.model.parameters() if id(p) not in inside]


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
