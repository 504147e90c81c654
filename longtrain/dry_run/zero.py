"""DeepSpeed on pretended devices: what it must be told so that its own code runs there, and whose its tensors are.

Its ZeRO is Python on torch's operators, so every allocation of it is seen. It asks an accelerator object of its own
about devices, wants numbers of tensors that have none, and moves modules in ways that fake tensors refuse.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longtrain.dry_run import device as dry_device
from longtrain.dry_run.tracker import Term, Tracker
from longtrain.engines.deepspeed import DeepSpeedEngine, import_deepspeed


@contextmanager
def pretended(device: torch.device) -> Iterator[None]:
    """DeepSpeed works on `device` inside the block, with tensors without memory. Once per process."""
    import_deepspeed()
    from deepspeed.runtime.zero import utils
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    with ExitStack() as changes:
        changes.enter_context(patch.object(DeepSpeedZeroOptimizer, "has_overflow", lambda *given, **options: False))
        changes.enter_context(patch.object(utils, "assert_lst_len_same_as_other_ranks", lambda given: None))
        changes.enter_context(patch.object(utils, "get_lst_from_rank0", lambda given: given))
        changes.enter_context(patch.object(nn.Module, "_apply", _apply))
        changes.enter_context(patch.object(DeepSpeedEngine, "_held_sizes", _held_sizes))
        if device.type != "cpu":
            changes.enter_context(patch.object(Tensor, "record_stream", lambda tensor, stream: None))
            _accelerate(device)
        yield


@torch.no_grad()
def _apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply for fake tensors, which it cannot swap: weights stay and get new data."""
    for child in module.children():
        _apply(child, function)
    for parameter in module._parameters.values():
        if parameter is not None and (changed := function(parameter)) is not parameter:
            parameter.data = changed
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _held_sizes(engine: DeepSpeedEngine) -> list[dict[str, int]]:
    """Those of the ranks, which cannot be asked: the next one holds of every weight what this one does not."""
    own, world = {name: place.size for name, place in engine._places.items()}, engine._world
    sizes = [dict.fromkeys(own, 0) for _ in range(world)]
    rank = dist.get_rank()
    sizes[(rank + 1) % world] = {name: engine._shapes[name].numel() - size for name, size in own.items()}
    sizes[rank] = own
    return sizes


def _accelerate(device: torch.device) -> None:
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):
        """The dry device, as DeepSpeed asks about devices."""

        Stream: Any = dry_device.Stream
        Event: Any = dry_device.Event

        def __init__(self) -> None:
            super().__init__()
            self._name = dry_device.NAME
            self._communication_backend_name = "fake"

        def is_synchronized_device(self) -> bool:
            return False

        def device_name(self, device_index: int | None = None) -> str:
            return dry_device.NAME if device_index is None else f"{dry_device.NAME}:{device_index}"

        def current_device(self) -> int:
            return 0

        def current_device_name(self) -> str:
            return f"{dry_device.NAME}:0"

        def device_count(self) -> int:
            return 1

        def stream(self, stream: Any) -> Any:
            return nullcontext()

        def current_stream(self, device_index: int | None = None) -> Any:
            return dry_device.Stream()

        default_stream = current_stream

        def on_accelerator(self, tensor: Tensor) -> bool:
            return tensor.device.type == dry_device.NAME

        def available_memory(self, device_index: int | None = None) -> int:
            return 2**60  # with less, DeepSpeed lays weights out on the host

        def pin_memory(self, tensor: Tensor, make_copy: bool = True, match_shape: bool = True) -> Tensor:
            return tensor

    set_accelerator(Accelerator())


@contextmanager
def watched(tracker: Tracker) -> Iterator[None]:
    """What DeepSpeed makes when it gathers weights and sums up gradients belongs to these."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def moving(method: Any) -> Any:
        @wraps(method)
        def _moved(*given: Any, **options: Any) -> Any:
            with tracker.making(Term.GATHERED):
                return method(*given, **options)

        return _moved

    def keeping(method: Any) -> Any:
        @wraps(method)
        def _kept(zero: Any, *given: Any, **options: Any) -> Any:
            result = method(zero, *given, **options)
            tracker.mark([zero.grads_in_partition, getattr(result, "flat_partition", None)], Term.GRADIENTS)
            return result

        return _kept

    watchers = {
        (PartitionedParameterCoordinator, "fetch_sub_module"): moving,
        (PartitionedParameterCoordinator, "release_sub_module"): moving,
        (DeepSpeedZeroOptimizer_Stage3, "reduce_ready_partitions_and_remove_grads"): moving,
        (DeepSpeedZeroOptimizer_Stage3, "independent_gradient_partition_epilogue"): moving,
        (DeepSpeedZeroOptimizer, "setup_buckets"): moving,
        (DeepSpeedZeroOptimizer, "reduce_ready_partitions_and_remove_grads"): moving,
        (DeepSpeedZeroOptimizer, "overlapping_partition_gradients_reduce_epilogue"): moving,
        (DeepSpeedZeroOptimizer, "_build_compact_grad_partition_buffer"): keeping,
        (DeepSpeedZeroOptimizer, "copy_grads_in_partition"): keeping,
    }
    with ExitStack() as changes:
        for (kind, name), watcher in watchers.items():
            changes.enter_context(patch.object(kind, name, watcher(getattr(kind, name))))
        yield


def mark(engine: DeepSpeedEngine, tracker: Tracker) -> None:
    """Say whose the tensors are that DeepSpeed has made at its start, and which gradients are kept."""
    zero, parameters = engine._zero, list(engine._parameters.values())

    def gradient_made(parameter: Tensor) -> None:
        tracker.mark([parameter.grad, getattr(parameter, "grad_accum", None)], Term.GRADIENTS)

    if engine.stage == 0:
        tracker.mark(parameters, Term.WEIGHTS)
    elif engine.stage < 3:
        tracker.mark(parameters, Term.GATHERED)
    else:
        tracker.mark([p.data for p in parameters], Term.GATHERED)
        tracker.mark([bucket.buffer for bucket in zero.ipg_buckets.values()], Term.GATHERED)
        tracker.mark([zero.lp_param_buffer, *zero.fp32_partitioned_groups_flat], Term.WEIGHTS)
        tracker.mark(zero.grad_partitions_flat_buffer, Term.GRADIENTS)
    tracker.mark([place.flat for place in engine._places.values()], Term.WEIGHTS)
    tracker.mark(getattr(zero, "fp32_groups_gradients_flat", []), Term.GRADIENTS)
    if engine.stage < 2:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(gradient_made)
