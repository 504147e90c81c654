"""One rank's part of a training step of the real program, and the memory that it holds.

The program is what a training run executes: `build_trainer`, then `train_step`. The optimizer's state is made before,
zero, as a checkpoint would find it, so that one step shows what every later one holds. With DeepSpeed a step before
does that, since only then its stage 3 knows what to gather ahead.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.distributed.fake_pg import FakeStore

from longtrain.data import build_data
from longtrain.dry_run import Held, zero
from longtrain.dry_run import device as dry_device
from longtrain.dry_run.modes import Fakes, Program
from longtrain.dry_run.tracker import Term, Tracker
from longtrain.engines.deepspeed import DeepSpeedEngine
from longtrain.errors import UsageError
from longtrain.kernels import launching
from longtrain.parallel import build_mesh
from longtrain.recipe import Recipe, degrees
from longtrain.train import Processes, build_trainer
from longtrain.trainer import Trainer


def run(recipe: Recipe, *, world: int, rank: int = 0, architecture: str | None = None, real: bool = False) -> Held:
    """One step as `rank` of `world`; see `longtrain.launch.dry_runs.dry_run`. Once per process."""
    _check(recipe, world=world, rank=rank, architecture=architecture, real=real)
    start = time.perf_counter()
    data, sequence = degrees(recipe, world)
    device = join(world=world, rank=rank, architecture=architecture, real=real)
    training, _ = build_data(recipe.data, seed=recipe.seed)
    mesh = build_mesh(device.type, data=data, sequence=sequence, rows=recipe.parallel.rows)
    with ExitStack() as changes:
        if recipe.engine == "deepspeed" and not real:
            changes.enter_context(zero.pretended(device))
        tracker, program = changes.enter_context(watched(device, real=real))
        changes.enter_context(_fsdp_watched(tracker) if recipe.engine == "fsdp" else zero.watched(tracker))
        trainer = build_trainer(recipe, Processes(rank, world, mesh, device), training)
        building = tracker.peak()
        if isinstance(trainer.engine, DeepSpeedEngine):
            zero.mark(trainer.engine, tracker)
        else:
            tracker.mark(_local(trainer.model.parameters()), Term.WEIGHTS)
        loader = _AtOnce(program)
        trainer._loader = cast(Any, loader)
        _watch(trainer, tracker)
        if recipe.engine == "deepspeed":
            trainer.train_step()  # makes the optimizer's state, and learns the order of modules, to gather ahead
        else:
            with tracker.making(Term.OPTIMIZER):
                trainer.tensors()
        tracker.restart()
        trainer.train_step()
        peak, after = tracker.peak(), tracker.held()
    seconds = time.perf_counter() - start
    dist.destroy_process_group()
    return Held(building, peak, after, tracker.host_peak, loader.tokens, seconds)


def _check(recipe: Recipe, *, world: int, rank: int, architecture: str | None, real: bool) -> None:
    if world < 1 or not 0 <= rank < world:
        raise UsageError(f"--rank: got {rank} of --world {world}, expected 0 to {max(world, 1) - 1}")
    if architecture is not None and architecture not in launching.ARCHITECTURES:
        names = ", ".join(launching.ARCHITECTURES)
        raise UsageError(f"--architecture: got {architecture!r}, expected one of {names}, or none for CPUs")
    if real and (world > 1 or architecture is not None):
        raise UsageError(f"--real: got a world of {world} of {architecture or 'CPUs'}, expected one CPU")


@contextmanager
def watched(device: torch.device, *, real: bool = False) -> Iterator[tuple[Tracker, Program]]:
    """What runs inside the block has no memory, unless `real`, and is followed."""
    fakes, tracker = None if real else Fakes(), Tracker(device)
    program = Program(device, fakes, tracker)
    with ExitStack() as modes:
        for mode in (fakes, tracker, program):
            if mode is not None:
                modes.enter_context(mode)
        yield tracker, program


def join(*, world: int, rank: int, architecture: str | None, real: bool = False) -> torch.device:
    """Make the process group, and the device where tensors live; once per process."""
    if real:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  (public, in torch's documentation)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        return torch.device("cpu")
    device, backend = torch.device("cpu"), "fake"
    if architecture is not None:
        device, backend = dry_device.install(), f"cpu:fake,{dry_device.NAME}:fake"
        launching.pretend(architecture)
    dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world)
    return device


class _AtOnce:
    """The trainer's loader, without a thread, in which no mode would hold: batches are made when they are asked for."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self.tokens = 0
        """Of the longest micro-batch so far."""

    def submit(self, function: Callable[[], list[Any]]) -> "Future[list[Any]]":
        future: Future[list[Any]] = Future()
        with self._program.preparing():
            batches = function()
        self.tokens = max(self.tokens, *(batch.tokens.numel() for batch in batches))
        future.set_result(batches)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing is left to do."""


def _watch(trainer: Trainer, tracker: Tracker) -> None:
    """Tell the tracker what it cannot see: which tensors go from layer to layer, and when the optimizer runs."""

    def enters(block: nn.Module, inputs: tuple[Any, ...]) -> None:
        tracker.mark(inputs[0], Term.INPUTS)

    for block in trainer.model.get_submodule("blocks").children():
        block.register_forward_pre_hook(enters)
    making: list[Any] = []

    def begins(*_: Any) -> None:
        making.append(tracker.making(Term.OPTIMIZER))
        making[-1].__enter__()

    def ends(*_: Any) -> None:
        making.pop().__exit__(None, None, None)

    register_optimizer_step_pre_hook(begins)
    register_optimizer_step_post_hook(ends)


@contextmanager
def _fsdp_watched(tracker: Tracker) -> Iterator[None]:
    """What fully_shard makes when it gathers weights and reduces gradients belongs to these."""
    methods = {name: getattr(FSDPParamGroup, name) for name in ("unshard", "wait_for_unshard", "post_backward")}

    def watched(method: Any) -> Any:
        @wraps(method)
        def _call(group: Any, *given: Any, **options: Any) -> Any:
            with tracker.making(Term.GATHERED):
                result = method(group, *given, **options)
            tracker.mark(group._partial_reduce_output, Term.GRADIENTS)  # which wait for those of other replicas
            for parameter in group.fsdp_params:
                if parameter.sharded_param.grad is not None:
                    tracker.mark(_local([parameter.sharded_param.grad]), Term.GRADIENTS)
            return result

        return _call

    propagator: Any = ShardingPropagator
    shapes = propagator._propagate_tensor_meta_non_cached

    @wraps(shapes)
    def muted(*given: Any) -> Any:
        with tracker.muted():
            return shapes(*given)

    for name, method in methods.items():
        setattr(FSDPParamGroup, name, watched(method))
    propagator._propagate_tensor_meta_non_cached = muted
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = shapes
        for name, method in methods.items():
            setattr(FSDPParamGroup, name, method)


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts."""
    return [x._local_tensor if isinstance(x, DTensor) else x for x in tensors]
