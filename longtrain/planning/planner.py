"""The plan of a recipe on named devices: memory by term, time, links, what binds, and the change that helps most."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from longtrain.config import compose
from longtrain.errors import UsageError
from longtrain.planning.devices import Devices
from longtrain.planning.documents import longest_documents
from longtrain.planning.holding import holding
from longtrain.planning.roofline import Times, times
from longtrain.planning.terms import CONTEXT, MARGIN, Memory, memory
from longtrain.planning.work import Shape
from longtrain.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on these devices."""

    shape: Shape

    @property
    def recipe(self) -> Recipe:
        return self.shape.recipe

    @property
    def devices(self) -> Devices:
        return self.shape.devices

    @cached_property
    def memory(self) -> Memory:
        """Bytes of the fullest device, by term, at the fullest moment of a step."""
        return memory(self.shape)

    @cached_property
    def times(self) -> Times:
        return times(self.shape)

    @property
    def margin(self) -> float:
        """Bytes for what allocators waste and libraries hold beside tensors."""
        return self.memory.total * MARGIN + CONTEXT * (self.devices.device.architecture is not None)

    @property
    def needed(self) -> float:
        return self.memory.total + self.margin

    @property
    def building(self) -> float:
        """Bytes of a device before the first step, at most."""
        return holding(self.shape).building

    @property
    def uncounted(self) -> list[str]:
        """Keys of DeepSpeed's that the recipe's file sets and this plan leaves out; a dry run has them."""
        return holding(self.shape).uncounted

    @property
    def over(self) -> float:
        """Bytes that are missing on a device, in a step or before; negative where some are left."""
        return max(self.needed, self.building) - self.devices.device.memory

    @property
    def host_over(self) -> float:
        """Bytes that are missing on a node's host."""
        device = self.devices.device
        return self.memory.host * min(device.node, self.devices.count) - device.host_memory

    @property
    def fits(self) -> bool:
        return self.over <= 0 and self.host_over <= 0

    @property
    def tokens_per_second(self) -> float:
        """Of one device."""
        return self.shape.step_tokens / self.times.step / self.devices.count

    @property
    def utilization(self) -> float:
        """Model FLOPs, nothing computed again counted, as a share of the devices' peak."""
        device = self.devices.device
        peak = device.bfloat16 if self.shape.size == 2 else device.float32
        return self.shape.model_flops / self.times.step / self.devices.count / peak


@dataclass(frozen=True)
class Change:
    """A change of the recipe, as one writes it on the command line, and the plan with it."""

    overrides: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        return " ".join(self.overrides)


def plan(name: str, overrides: Sequence[str], devices: Devices) -> Plan:
    """The plan of a recipe with these keys changed.

    Raises:
        UsageError: the recipe cannot work, or not on so many devices.
    """
    # How many processes a launch starts is for the devices of the plan to say.
    recipe = compose(name, [*overrides, "launch.processes=null"])
    return Plan(Shape(recipe, devices, longest_documents(recipe, devices)))


def changes(name: str, overrides: Sequence[str], devices: Devices) -> list[Change]:
    """Single changes that are possible, each planned."""
    now = plan(name, overrides, devices)
    found = []
    for change in _candidates(now):
        try:
            found.append(Change(change, plan(name, [*overrides, *change], devices)))
        except UsageError:  # contradicts another key
            continue
    return found


def that_fit(name: str, overrides: Sequence[str], devices: Devices, *, count: int = 3) -> list[Change]:
    """Changes that make a plan fit, the fastest first; pairs of changes where single ones don't do.

    Those that train on other sequences come last, however fast these are.
    """
    single, now = changes(name, overrides, devices), plan(name, overrides, devices)
    found = [change for change in single if change.plan.fits]
    if len(found) < count:
        memory_first = sorted(single, key=lambda change: change.plan.needed)[:4]
        for change in memory_first:
            if change.plan.fits:
                continue  # does without another one
            more = changes(name, [*overrides, *change.overrides], devices)
            pairs = (Change(change.overrides + other.overrides, other.plan) for other in more if other.plan.fits)
            found += [pair for pair in pairs if not any(set(one.overrides) <= set(pair.overrides) for one in found)]
    unique = {frozenset(change.overrides): change for change in found}

    def cost(change: Change) -> tuple[bool, float]:
        return change.plan.recipe.data.length != now.recipe.data.length, -change.plan.tokens_per_second

    return sorted(unique.values(), key=cost)[:count]


def best_change(name: str, overrides: Sequence[str], devices: Devices) -> Change | None:
    """The single change that makes a step of a plan that fits fastest; None where none does."""
    now = plan(name, overrides, devices)
    faster = [
        change
        for change in changes(name, overrides, devices)
        if change.plan.fits
        and change.plan.shape.step_tokens == now.shape.step_tokens
        and change.plan.tokens_per_second > now.tokens_per_second * 1.01
    ]
    return max(faster, key=lambda change: change.plan.tokens_per_second, default=None)


def _candidates(now: Plan) -> list[tuple[str, ...]]:
    recipe, (data, sequence) = now.recipe, now.shape.degrees
    found: list[tuple[str, ...]] = [
        (f"memory.recompute={policy}",) for policy in ("none", "attention", "full") if policy != recipe.memory.recompute
    ]
    found += [(f"parallel.layout={layout}",) for layout in ("contiguous", "zigzag") if layout != recipe.parallel.layout]
    if recipe.trainer.precision != "bfloat16" and now.devices.device.architecture is not None:
        found.append(("trainer.precision=bfloat16",))
    if not recipe.memory.shard_blocks:
        found.append(("memory.shard_blocks=true",))
    if not recipe.fsdp.cpu_offload and now.devices.device.architecture is not None:
        offload = "fsdp.cpu_offload=true" if recipe.engine == "fsdp" else "deepspeed.offload_optimizer=cpu"
        found.append((offload,))
    if recipe.engine == "deepspeed" and recipe.deepspeed.stage < 3:
        found.append((f"deepspeed.stage={recipe.deepspeed.stage + 1}",))
    for key, value in (("offload", "inputs"), ("offload", "attention")):
        if getattr(recipe.memory, key, value) != value:
            found.append((f"memory.{key}={value}",))
    if getattr(recipe.memory, "tile", 0) is None:
        found.append(("memory.tile=4096",))
    if recipe.memory.attention_heads != 1:
        found.append(("memory.attention_heads=1",))
    if data > 1:
        found.append((f"parallel.data={data // 2}", f"parallel.sequence={sequence * 2}"))
    if sequence % 2 == 0 and recipe.trainer.sequences % (2 * data * recipe.trainer.accumulation) == 0:
        found.append((f"parallel.data={data * 2}", f"parallel.sequence={sequence // 2}"))
    each = recipe.trainer.sequences // (data * recipe.trainer.accumulation)
    if each > 1 and each % 2 == 0:
        found.append((f"trainer.accumulation={recipe.trainer.accumulation * 2}",))
    rounded = 2 ** (recipe.data.length - 1).bit_length() // 2
    if rounded >= 1024:
        found.append((f"data.length={rounded}",))
    return found
