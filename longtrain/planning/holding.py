"""What each engine holds of weights, gradients and optimizer state: resident, gathered for what runs, and on the host.

fsdp's and ZeRO-3's are exact, by dry runs. Stages 0 to 2 are so up to the moments when gradients are summed up, which
differ from rank to rank there. Letters: N weights, R ranks, s bytes of a number that is computed with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property

from longtrain.engines import Wanted, deepspeed_json, fit_buffers, own_buffers
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

    @property
    def hooked(self) -> bool:
        """Whether a block's gradient is held until its backward has ended."""
        return False

    @property
    def _accumulates(self) -> bool:
        """Whether all gradients are there from an earlier micro-batch on."""
        return self.shape.recipe.trainer.accumulation > 1

    @property
    @abstractmethod
    def copied(self) -> float:
        """Bytes of each of the rank's weights that a micro-batch copies from or to the host, the busier way."""

    @property
    def uncounted(self) -> list[str]:
        """What the recipe sets and the formulas leave out."""
        return []

    def loss(self) -> list[tuple[str, float]]:
        """What is held beside the loss, term by term."""
        return []

    def after_loss(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """The moments between the loss and the last block's backward by name, each with what it holds beside."""
        yield from ()

    @abstractmethod
    def waiting(self, gradients: float) -> float:
        """Bytes of so many gradients of the block that runs, made while it still needs room."""

    @abstractmethod
    def end(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """The moments at the end of backward by name, each with what it holds beside what is resident."""

    @property
    def host(self) -> float:
        """Bytes in host memory: weights, gradients and state, or none."""
        return 0.0 if self.here else self.shape.weights * self.share * (4 + 4 + states(self.shape))

    @property
    @abstractmethod
    def here(self) -> bool:
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
    def here(self) -> bool:
        return not (self.shape.recipe.fsdp.cpu_offload and self.shape.devices.device.architecture is not None)

    @property
    def copied(self) -> float:
        gathers = 2 if self.shape.recipe.memory.shard_blocks else 1  # in forward, and again in backward
        return 4.0 * gathers * (not self.here)

    @property
    def _outside(self) -> int:
        """Weights that are gathered as long as the model runs."""
        return self.shape.outer_weights if self.shape.recipe.memory.shard_blocks else self.shape.weights

    def resident(self, add: Add) -> None:
        shape = self.shape
        if self.here:
            add("weights", 4 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        add("gathered weights", shape.size * self._outside)
        if self._accumulates:
            add("gradients", 4 * shape.weights * self.share * self.here)

    def block(self, index: int, add: Add) -> None:
        shape, done = self.shape, self.shape.block_weights[index + 1 :]
        if shape.recipe.memory.shard_blocks:
            add("gathered weights", shape.size * shape.block_weights[index])
            if not self._accumulates:
                add("gradients", 4 * sum(done) * self.share * self.here)
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
                ("gradients", 4 * (shape.weights - outside) * self.share * self.here * (not self._accumulates)),
            ]
            last = ("gathered weights", 4 * outside * self.share)
            yield name, [*terms, ("working set", shape.size * outside) if name == "copied" else last]

    @property
    def building(self) -> float:
        shape = self.shape
        largest = shape.vocabulary * shape.recipe.model.width  # a share on its way to the host
        return 4.0 * (self._whole + self.share * (shape.weights if self.here else largest))


_ALL_REDUCE = 5e8  # numbers that DeepSpeed's stage 0 sums up at once, and one weight's more


class ZeroHolding(Holding):
    """ZeRO: float32 weights and optimizer state in shares from stage 1 on, gradients from 2, computed weights at 3.

    Stage 0 is plain data parallelism in float32. Stage 1 in bfloat16 has float32 gradients beside, made once.
    """

    @property
    def host(self) -> float:
        """Beside the usual, gradients as they come and flat at stage 3; weights on their way back at 1 and 2.

        Stage 3 lays its weights out anew at its start, and puts them into host memory meanwhile.
        """
        each, size = self.shape.weights * self.share, self.shape.size
        if self.here:
            return size * each * (self.stage == 3 and self.shape.devices.device.architecture is not None)
        return super().host + (4.0 * each if self.stage == 3 else size * (each + self._table))

    @property
    def stage(self) -> int:
        return self.shape.recipe.deepspeed.stage

    @property
    def copied(self) -> float:
        return 4.0 * (not self.here)

    @property
    def uncounted(self) -> list[str]:
        return [key for key in own_buffers(self.shape.recipe.deepspeed) if key != "reduce_bucket_size"]

    @property
    def share(self) -> float:
        return 1.0 if self.stage == 0 else 1.0 / self.shape.devices.count

    @property
    def here(self) -> bool:
        offload = self.shape.recipe.deepspeed.offload_optimizer != "none"
        return not (offload and self.shape.devices.device.architecture is not None)

    @cached_property
    def _bucket(self) -> float:
        """Numbers of gradients that are summed up at once."""
        recipe, trainer = self.shape.recipe, self.shape.recipe.trainer
        wanted = Wanted(precision=trainer.precision, clip=trainer.clip, accumulation=trainer.accumulation)
        zero = deepspeed_json(recipe.deepspeed, wanted)["zero_optimization"]
        blocks = self.shape.block_weights if recipe.memory.shard_blocks else []
        fit_buffers(zero, [[weights] for weights in blocks], [self.shape.weights - sum(blocks)])
        return min(float(zero["reduce_bucket_size"]), self.shape.weights)

    @property
    def _table(self) -> int:
        """Weights of the largest matrix."""
        return self.shape.vocabulary * self.shape.recipe.model.width

    @property
    def _tied(self) -> float:
        """Bytes of the head's gradient while it waits for the embedding's, which is added to it."""
        return self.shape.size * self._table if self.shape.recipe.model.tie_embedding else 0.0

    @property
    def _beside(self) -> bool:
        return self.stage == 1 and self.shape.size == 2 and self.here

    def resident(self, add: Add) -> None:
        shape, stage = self.shape, self.stage
        if stage > 0:  # what is computed with, beside the float32 shares
            computed = shape.size * shape.weights
            add(*("gathered weights", computed) if stage < 3 else ("weights", computed * self.share))
        if self.here:
            add("weights", 4 * shape.weights * self.share)
            add("optimizer", states(shape) * shape.weights * self.share)
        if self._beside:
            add("gradients", 4.0 * shape.weights)
        if 0 < stage < 3 and not self.here:
            add("working set", shape.size * self._table)  # on whose way to the host it is
        if stage < 2 and self._accumulates:
            add("gradients", self._wide * shape.weights)
        if stage == 2:
            add("gradients", 4 * shape.weights * self.share)  # made once, wherever they go then
        if stage == 3:  # buffers that are made once, and what runs outside of blocks
            add("gathered weights", shape.size * shape.outer_weights)
            add("gathered weights", 4.0 * self._bucket)
            add("gradients", 4 * shape.weights * self.share * self.here)

    def block(self, index: int, add: Add) -> None:
        shape, blocks = self.shape, self.shape.block_weights
        add("working set", self._tied)
        if self.stage == 3:
            add("gathered weights", shape.size * sum(blocks[max(index - 1, 0) : index + 1]))  # one ahead
            return
        if self.stage < 2 and not self._accumulates:
            add("gradients", self._wide * (sum(blocks[index + 1 :]) + self._table * (not self._tied)))
        if self.stage == 2 or (self.stage == 1 and not self._beside):
            add("gathered weights", (shape.size if self.stage == 2 else 4) * self._bucket)

    @property
    def _wide(self) -> int:
        """Bytes of a gradient that is kept whole."""
        return self.shape.size if self.here else 4

    @property
    def hooked(self) -> bool:
        return self.stage == 3

    def loss(self) -> list[tuple[str, float]]:
        if self.stage < 3:
            return []
        return [("gathered weights", self.shape.size * sum(self.shape.block_weights[-2:]))]  # until their backward

    def after_loss(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        if self.stage < 3:
            return
        shape, kept = self.shape, self.loss()
        outside = shape.size * shape.outer_weights
        normed = shape.size * shape.tokens * shape.recipe.model.width  # the head's input, which is gone by then
        head = ("working set", shape.size * self._table - normed)
        yield "weights outside of blocks gathered again", [*kept, ("gathered weights", outside)]
        yield "gradient of the head summed", [*kept, head, ("gathered weights", self._copied)]

    @property
    def _copied(self) -> float:
        """Bytes of the float32 copy of what stage 3 sums up at once, at most, and of a share on its way to the host."""
        away = 3 * 4.0 * self._table * self.share * (not self.here)
        if self._table <= self._bucket:
            return 4.0 * self._bucket + away
        return 4.0 * self._table * (self.shape.size == 2) + away

    def waiting(self, gradients: float) -> float:
        return (self._wide if self.stage == 1 else self.shape.size) * gradients * (self.stage != 2)

    def end(self) -> Iterator[tuple[str, list[tuple[str, float]]]]:
        """The largest gradient, or all that are summed up at once, in float32 beside itself."""
        shape, stage = self.shape, self.stage
        at_once = 4.0 * (self._table if self._table > self._bucket else self._bucket)
        waiting = ("working set", shape.size * self._table + self._tied)
        last = self._wide * shape.weights * (not self._accumulates)
        if stage == 3:
            yield "summed", [waiting, ("gathered weights", self._copied)]
        elif stage == 2:
            yield "summed", [waiting, ("gathered weights", at_once + 4 * self._bucket)]
        elif stage == 1:
            extra = ("working set", 4.0 * self._table) if self._beside else ("gathered weights", at_once)
            yield "summed", [("gradients", last), extra]
        else:
            copied = min(_ALL_REDUCE + self._table, shape.weights)
            yield "summed", [("gradients", last), ("working set", 4.0 * copied)]

    @property
    def building(self) -> float:
        shape, drawn = self.shape, max(*self.shape.block_weights, self._table)  # a part of the model, and no other
        if self.stage < 3:
            begun = 4.0 * (shape.weights + self._table)
            if self.stage == 0:
                return begun
            flat = 2.0 * shape.size * shape.weights  # beside those that were there
            made = shape.weights * (shape.size + 4 * self.share * self.here + 4.0 * self._beside)
            return max(begun, flat, made + 4.0 * drawn * (shape.size == 2))
        made = shape.weights * self.share * (shape.size + (4 + 4) * self.here) + 4.0 * self._bucket
        exact = made + 4.0 * drawn  # then each part gets its exact values
        outside = shape.outer_weights if shape.recipe.memory.shard_blocks else shape.weights  # cut last, all at once
        return max(exact, shape.size * (outside + self.share * (shape.weights - outside + self._table)))


def holding(shape: Shape) -> Holding:
    """That of the recipe's engine."""
    return ZeroHolding(shape) if shape.recipe.engine == "deepspeed" else FSDPHolding(shape)
