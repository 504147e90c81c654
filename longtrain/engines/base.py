"""What a trainer asks of an engine: who holds which weights, gradients and optimizer state, and who sums what."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from longtrain.optimizer import OptimizerConfig

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Setup:
    """What an engine is made of: a model, and what the trainer wants done with it.

    Weights come whole, the same on every rank, float32, on the device of the mesh; or on the meta device, with `values`
    that gives their values by name, whole and one after the other, so that an engine need not hold more of them than it
    keeps and one block. Blocks are the parts of the model whose weights are gathered one at a time; none: all at once.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    mesh: DeviceMesh  # over all ranks, as `longtrain.parallel.build_mesh` makes it
    precision: str  # a name in PRECISIONS: what is computed in; gradients are summed in float32
    optimizer: OptimizerConfig
    clip: float  # largest norm of all gradients together; inf: any
    accumulation: int = 1  # micro-batches of a step
    values: Callable[[], Iterable[tuple[str, Tensor]]] | None = None  # weights and buffers; the last of a name counts


class Engine(ABC):
    """Spreads weights, gradients and optimizer state over all ranks, data and sequence alike, and takes the steps.

    A step is, for each micro-batch, `begin`, a call of `model` and `backward` of this rank's part of the step's loss;
    then `step`. All ranks call everything together. The gradient that `step` uses is the sum over ranks and
    micro-batches of the gradients of ``loss / valid``: engines that average multiply first.
    """

    model: nn.Module  # maps what the model maps, on this rank's tokens, with gathered weights

    @abstractmethod
    def begin(self, *, last: bool) -> None:
        """Before a micro-batch; last: of its step, so gradients must be summed over ranks with its backward."""

    @abstractmethod
    def backward(self, loss: Tensor, valid: Tensor) -> None:
        """Add the gradient of ``loss / valid``: the sum over this rank's tokens, and a float64 number, 1 or more."""

    @abstractmethod
    def step(self, rate_factor: float) -> Tensor:
        """Clip, move the weights at each optimizer's peak rate times ``rate_factor``, drop the gradients.

        Returns the norm of all gradients together before clipping, as a tensor that the host need not wait for.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Weights (``model.<name>``) and optimizer state (``optimizer.<kind>.<name>``) for a checkpoint, by name.

        Each is whole on every rank or a `DTensor` sharded by rows; the names do not depend on the engine. After writing
        into them, `loaded` makes them the engine's. Weights that need no gradient are not among them: they are another
        model's.
        """

    @abstractmethod
    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Take over what was written into the tensors that `tensors` gave."""


def give_memory(module: nn.Module, mesh: DeviceMesh, *, hollow: bool = False) -> None:
    """Give what a module has on the meta device memory on the mesh's device, whose content is not set.

    Weights that are tied inside of the module stay tied. hollow: weights get that of one number, which stands for all.
    """
    device, made = torch.device(mesh.device_type), {}

    def real(tensor: Tensor) -> Tensor:
        if tensor not in made:
            weight = isinstance(tensor, nn.Parameter)
            shape = () if weight and hollow else tensor.shape
            empty = torch.empty(shape, dtype=tensor.dtype, device=device).expand(tensor.shape)
            made[tensor] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if weight else empty
        return made[tensor]

    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.device.type == "meta":
                    held[name] = real(tensor)  # type: ignore[assignment]


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers under all of their names."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for tensors in named for name, tensor in tensors}


EngineFactory = Callable[[Setup], Engine]
