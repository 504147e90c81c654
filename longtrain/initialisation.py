"""The values that a model begins with, made a part at a time, for who keeps only a share of each.

A decoder made on the meta device has shapes and no memory. What it would hold had it been made on a real device comes
from here, number by number the same, and of the model never more than a block is whole at once.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig, draws

Values = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives weights and buffers by name, one after the other."""


def shapes_and_values(
    config: ModelConfig,
    layers: LayersConfig,
    *,
    vocabulary: int,
    memory: MemoryConfig,
    seed: int,
    device: torch.device,
    weights: bool = True,
) -> tuple[Decoder, Values]:
    """A decoder on the meta device, and what gives, each time, all that it would hold had it been made after a seed.

    That is the name and the value, on `device`, of every weight and buffer. A weight may come twice, and a tied one
    under either name: the last counts. weights: false gives the buffers alone, for weights that a checkpoint will
    bring, and draws no numbers.
    """
    with torch.device("meta"):
        model = Decoder(config, layers, vocabulary=vocabulary, memory=memory)
    order = [(name, parameter.shape, std) for name, parameter, std in draws(model, config)]
    made = partial(Decoder.parts, config, layers, vocabulary=vocabulary, memory=memory)
    return model, lambda: _values(made, order, seed=seed, device=device, weights=weights)


def _values(
    made: Callable[[], Iterator[tuple[str, Any]]],
    order: list[tuple[str, torch.Size, float]],
    *,
    seed: int,
    device: torch.device,
    weights: bool,
) -> Iterator[tuple[str, Tensor]]:
    torch.manual_seed(seed)
    parts, drawn = made(), {name for name, *_ in order}
    while (found := _next_part(parts, device, draw=weights)) is not None:
        prefix, part = found
        for name, value in chain(part.named_parameters(prefix), part.named_buffers(prefix)):
            if name not in drawn and (weights or not isinstance(value, torch.nn.Parameter)):
                yield name, value.detach()
        del found, part, value  # not beside the next one
    for name, shape, std in order if weights else ():
        yield name, _normal(shape, std, device)


def _normal(shape: torch.Size, std: float, device: torch.device) -> Tensor:
    value = torch.zeros(shape, device=device)
    return value.normal_(std=std) if std else value


def _next_part(parts: Iterator[tuple[str, Any]], device: torch.device, *, draw: bool) -> tuple[str, Any] | None:
    with device, torch.no_grad():
        if draw:
            return next(parts, None)
        with _Undrawn():
            return next(parts, None)


class _Undrawn(TorchDispatchMode):
    """Weights stay as they are where they would be filled with random numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default):
            return args[0]
        return func(*args, **(kwargs or {}))
