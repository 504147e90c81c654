"""Layers' inputs, and what recompute keeps, in host memory between forward and backward.

In forward each such tensor is copied to pinned host memory on a stream of its own, beside the computation, and its
device memory is free as soon as it is copied and forward is done with it. In backward the copies come back the same
way: when a layer's tensors are asked for, those of the layers that backward needs next are sent for too. At most
`in_flight` layers are under way at a time; forward waits for the oldest where more would be.

The device is a value like any other here; on a CPU, where all tensors lie in host memory, nothing is copied.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longtrain.errors import UsageError


class Copies(Protocol):
    """How tensors travel. Marks say when a copy is done: `wait` makes what is computed next wait for it."""

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        """Start a copy of x to host memory: the copy, and its mark."""
        ...

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        """Start a copy to the device: the copy, and its mark."""
        ...

    def wait(self, mark: Any) -> None: ...


class StreamCopies:
    """`Copies` on a side stream of an accelerator, to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream(device)

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        try:
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        except RuntimeError as error:
            raise UsageError(
                f"memory.offload: no pinned host memory left for {x.numel() * x.element_size():,} bytes more; offload "
                "less (inputs rather than attention), shorten data.length, or spread it over more ranks "
                f"(parallel.sequence): {error}"
            ) from error
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            host.copy_(x, non_blocking=True)
        if isinstance(self._stream, torch.Stream):  # that of a pretended device is not, and copies nothing later
            x.record_stream(self._stream)  # its memory is not given away before it is copied
        return host, self._stream.record_event()

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        x = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        # Its memory may still be read by what was computed last.
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            x.copy_(host, non_blocking=True)
        return x, self._stream.record_event()

    def wait(self, mark: Any) -> None:
        self._module.current_stream(self._device).wait_event(mark)


_streams: dict[torch.device, StreamCopies] = {}


def copies_for(device: torch.device) -> Copies | None:
    """How a device's tensors get to host memory; None on a CPU, where they are."""
    if device.type == "cpu":
        return None
    return _streams.setdefault(device, StreamCopies(device))


@dataclass
class Away:
    """One tensor in host memory, or on its way back."""

    layer: int
    host: Tensor | None
    back: tuple[Tensor, Any] | None = None


class Store:
    """What one forward pass puts away, layer by layer, for its backward pass.

    Args:
        copies: how tensors travel.
        in_flight: layers under way at a time, at least 1.
        kept: whether results that recompute keeps are put away too, not only layers' inputs.
    """

    def __init__(self, copies: Copies, *, in_flight: int, kept: bool) -> None:
        self.kept = kept
        self._copies, self._in_flight = copies, in_flight
        self._layers: list[list[Away]] = []
        self._leaving: deque[list[Any]] = deque()

    def next_layer(self) -> saved_tensors_hooks:
        """Begin a layer; what torch's checkpoint saves inside this context, the layer's input, is put away."""
        if len(self._leaving) >= self._in_flight:
            for mark in self._leaving.popleft():
                self._copies.wait(mark)
        self._layers.append([])
        self._leaving.append([])
        return saved_tensors_hooks(self.put, self.take)

    def put(self, x: Tensor) -> Away:
        """Send a tensor to host memory."""
        host, mark = self._copies.out(x.detach())
        away = Away(len(self._layers) - 1, host)
        self._layers[-1].append(away)
        self._leaving[-1].append(mark)
        return away

    def settle(self) -> None:
        """Let what is computed next wait for the copies of the layer under way: it writes to what is copied."""
        for mark in self._leaving[-1]:
            self._copies.wait(mark)

    def take(self, away: Away) -> Tensor:
        """The tensor on the device again, once; the layers before it are sent for."""
        if away.host is None and away.back is None:
            raise RuntimeError("backward ran twice: what memory.offload puts away is given back once")
        for layer in range(away.layer, max(away.layer - self._in_flight, 0) - 1, -1):
            for other in self._layers[layer]:
                if other.host is not None:
                    other.back, other.host = self._copies.back(other.host), None
        assert away.back is not None
        x, mark = away.back
        away.back = None
        self._copies.wait(mark)
        return x
