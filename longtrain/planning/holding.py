"""What each engine holds of weights, gradients and optimizer state: resident, gathered for what runs, and on the host.

fsdp's is exact, by the dry run. ZeRO's is worked out from reading what DeepSpeed allocates, and no measurement has
checked it; its buffers have the sizes of DeepSpeed's defaults, whatever a user's file says of them. Letters: N weights,
R ranks, s bytes of a number that is computed with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from longtrain.planning.work import Shape

Add = Callable[[str, float], None]
"""Adds bytes to a term."""


def states(shape: Shape) -> float:
    """Bytes of optimizer state for each weight."""
    optimizer = shape.recipe.optimizer
    adam = 8.0 if optimizer.adam == "fused" else 2.0 * (1 + 4 / 256)  # 8 bits, and a scale for each 256 weights
    if optimizer.name == "sgd":
        return 0.0
    if optimizer.name == "muon":
        inside = sum(shape.block_weights)
        return (4 * inside + adam * shape.outer_weights) / shape.weights
    return adam


class Holding(ABC):
    """One engine's part of the moments of a step."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    @property
    @abstractmethod
    def share(self) -> float:
        """Which part of what is sharded a device holds."""

    @abstractmethod
    def resident(self, add: Add) -> None:
        """What is there in every moment."""

    @abstractmethod
    def block(self, index: int, add: Add) -> None:
        """What is there beside it while a block's backward runs."""

    @abstractmethod
    def waiting(self, gradients: float) -> float:
        """Bytes of so many gradients of the block that runs, made while it still needs room."""

    @abstractmethod
    def end(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """The moments at the end of backward by name, each with what it holds beside what is resident."""

    @property
    def host(self) -> float:
        """Bytes in host memory: weights, gradients and state, or none."""
        return 0.0 if self._here else self.shape.weights * self.share * (4 + 4 + states(self.shape))

    @property
    @abstractmethod
    def _here(self) -> bool:
        """Whether the shares lie on the device."""

    @property
    def _whole(self) -> int:
        """Most weights that are whole at once while the model is made."""
        shape = self.shape
        return max(*shape.block_weights, shape.outer_weights) if shape.recipe.memory.shard_blocks else shape.weights

    @property
    @abstractmethod
    def building(self) -> float:
        """Most bytes on the device before the first step."""


class FSDPHolding(Holding):
    """fully_shard: shares in float32; blocks gathered one at a time, the next one ahead of its use."""

    @property
    def share(self) -> float:
        return self.shape.recipe.fsdp.replicas / self.shape.devices.count

    @property
    def _here(self) -> bool:
        return not (self.shape.recipe.fsdp.cpu_offload and self.shape.devices.device.architecture is not None)

    @property
    def _outside(self) -> int:
        """Weights that are gathered as long as the model runs."""
        return self.shape.outer_weights if self.shape.recipe.memory.shard_blocks else self.shape.weights

    def resident(self, add: Add) -> None:
        shape = self.shape
        if self._here:
            add("weights", 4 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        add("gathered weights", shape.size * self._outside)
        if self._accumulates:
            add("gradients", 4 * shape.weights * self.share * self._here)

    @property
    def _accumulates(self) -> bool:
        """Whether all gradients are there from an earlier micro-batch on."""
        return self.shape.recipe.trainer.accumulation > 1

    def block(self, index: int, add: Add) -> None:
        shape, done = self.shape, self.shape.block_weights[index + 1 :]
        if shape.recipe.memory.shard_blocks:
            add("gathered weights", shape.size * shape.block_weights[index])
            if not self._accumulates:
                add("gradients", 4 * sum(done) * self.share * self._here)
            if shape.devices.count > 1 and index > 0:
                add("gathered weights", shape.size * shape.block_weights[index - 1])
            if done:
                add("gathered weights", 4 * done[0])
        else:
            add("working set", shape.size * sum(done))
        add("working set", shape.size * shape.vocabulary * shape.recipe.model.width)  # the head's waits for the end

    def waiting(self, gradients: float) -> float:
        return self.shape.size * gradients

    def end(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """Weights outside of blocks, whose gradients wait until here, are reduced; the blocks' gradients are there."""
        shape, outside = self.shape, self._outside
        for name in ("copied", "summed"):
            terms = [
                ("gathered weights", -shape.size * outside),  # no longer needed
                ("gathered weights", 4.0 * outside),
                ("gradients", 4 * (shape.weights - outside) * self.share * self._here * (not self._accumulates)),
            ]
            last = ("gathered weights", 4 * outside * self.share)
            yield name, [*terms, ("working set", shape.size * outside) if name == "copied" else last]

    @property
    def building(self) -> float:
        shape = self.shape
        largest = shape.vocabulary * shape.recipe.model.width  # a share on its way to the host
        return 4.0 * (self._whole + self.share * (shape.weights if self._here else largest))


_BUCKET = 5e8  # numbers that DeepSpeed reduces at once, at most
_PREFETCH = 5e7  # numbers that ZeRO-3 gathers ahead


class ZeroHolding(Holding):
    """ZeRO: float32 weights and optimizer state in shares from stage 1 on, gradients from 2, computed weights at 3.

    Stage 0 is plain data parallelism in float32.
    """

    @property
    def stage(self) -> int:
        return self.shape.recipe.deepspeed.stage

    @property
    def share(self) -> float:
        return 1.0 if self.stage == 0 else 1.0 / self.shape.devices.count

    @property
    def _here(self) -> bool:
        offload = self.shape.recipe.deepspeed.offload_optimizer != "none"
        return not (offload and self.shape.devices.device.architecture is not None)

    @property
    def _bucket(self) -> float:
        return min(_BUCKET, self.shape.weights)

    @property
    def _gradients(self) -> float:
        """Bytes of gradients that a device holds when backward has ended."""
        sharded = self.stage >= 2
        return 4 * self.shape.weights * (self.share * self._here if sharded else 1.0)

    def resident(self, add: Add) -> None:
        shape, stage = self.shape, self.stage
        if stage > 0:  # what is computed with, beside the float32 shares
            add(
                "gathered weights" if stage < 3 else "weights",
                shape.size * shape.weights * (self.share ** (stage == 3)),
            )
        if self._here:
            add("weights", 4 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        if stage == 3:
            add("gathered weights", shape.size * shape.outer_weights)
            add("gathered weights", shape.size * self._bucket)
            add("gradients", self._gradients)  # made once

    def block(self, index: int, add: Add) -> None:
        shape, blocks = self.shape, self.shape.block_weights
        if self.stage == 3:
            add("gathered weights", shape.size * (blocks[index] + (min(_PREFETCH, blocks[index - 1]) if index else 0)))
            return
        done = sum(blocks[index + 1 :]) + shape.outer_weights
        if self.stage == 2:
            add("gathered weights", shape.size * self._bucket)
            add("gradients", self._gradients * done / shape.weights)
        else:
            add("gradients", 4.0 * done)

    def waiting(self, gradients: float) -> float:
        return self.shape.size * gradients * (self.stage < 2)

    def end(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        terms: list[tuple[str, float]] = []
        if self.stage < 3:
            terms.append(("gradients", self._gradients))
            terms.append(("gathered weights", self.shape.size * self._bucket))
        yield "reduced", terms

    @property
    def building(self) -> float:
        shape = self.shape
        if self.stage < 3:
            return 4.0 * shape.weights * (1 + self.share * self._here)
        return shape.weights * self.share * (shape.size + 4.0 * self._here) + 4.0 * self._whole


def holding(shape: Shape) -> Holding:
    """That of the recipe's engine."""
    return ZeroHolding(shape) if shape.recipe.engine == "deepspeed" else FSDPHolding(shape)
