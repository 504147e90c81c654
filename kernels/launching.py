"""How a Triton kernel is launched: the one way from an operator's host code to the card.

Operators call `launch`. Inside `with recording("sm_90") as launches:` nothing runs: each launch is written down, with
the configuration that the named architecture would get. So an operator's host code, called on tensors of the device
"meta", tells exactly which kernels a card would be given, and they can be compiled and examined without one.

Triton is imported only when it is used, so that longtrain works where there is none.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: block sizes and other constants by name, warps per program, stages of the pipeline."""

    constants: Mapping[str, int | bool]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: `args` fill the kernel's ordinary parameters, `constants` its constexpr ones."""

    kernel: Any  # triton.JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class _Recording:
    architecture: str
    launches: list[Launch] = field(default_factory=list)


# Of a whole process that has no card at all, its autograd threads included: what it is taken to have. A plain list,
# because a context variable would not reach those threads.
_pretended: list[str] = []

_recording: ContextVar[_Recording | None] = ContextVar("longtrain_recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, config: Config, **constants: Any) -> None:
    """Run `kernel` on `grid` (1 to 3 sizes); one with a size of 0 runs nothing.

    args: the kernel's ordinary parameters in order: tensors, tensor descriptors, numbers, None. All tensors lie on one
    device. constants: its constexpr parameters, beside those of `config`.
    """
    constants = {**config.constants, **constants}
    recording = _recording.get()
    if recording is not None:
        record = Launch(kernel, grid, args, constants, config.num_warps, config.num_stages)
        recording.launches.append(record)
        return
    if 0 in grid or _pretended:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if device.type == "cuda":  # Triton launches on the current device, whatever its tensors say
        with torch.cuda.device(device):
            kernel[grid](*args, **constants, **options)
    else:
        kernel[grid](*args, **constants, **options)


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Write launches down instead of running them, as for a card of `architecture`; this thread only."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: got {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    record = _Recording(architecture)
    token = _recording.set(record)
    try:
        yield record.launches
    finally:
        _recording.reset(token)


def pretend(architecture: str) -> None:
    """From now on, in this whole process, tensors are taken to lie on a card of `architecture`, and no kernel runs.

    For dry runs, whose tensors have no memory: an operator's host code allocates as it would, and launches nothing.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture: got {architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    _pretended[:] = [architecture]


def runs_nothing(device: torch.device) -> bool:
    """Whether tensors of this device have shapes only: "meta", or a pretended card."""
    return device.type == "meta" or (bool(_pretended) and device.type not in ("cpu", "cuda"))


Block = TypeVar("Block")


def visited(blocks: Sequence[Block], device: torch.device, *, first: int = 2) -> Sequence[Block]:
    """Those blocks that a loop over memory has to go through: all of them.

    On a pretended card the first ones and the last one: those between hold what the last of the first ones does, and a
    dry run of a million tokens would be busy with them for minutes.
    """
    pretended = bool(_pretended) and runs_nothing(device)
    return [*blocks[:first], blocks[-1]] if pretended and len(blocks) > first + 1 else blocks


def tiles(count: int, size: int, device: torch.device) -> Sequence[slice]:
    """0 ... count in slices of at most `size`, those that a loop on this device has to go through (`visited`)."""
    return visited([slice(start, min(start + size, count)) for start in range(0, count, size)], device)


def architecture(device: torch.device) -> str:
    """The architecture whose configurations a device gets, one of ARCHITECTURES.

    NVIDIA cards between and beyond these get those of the nearest one that is not above them; those with little shared
    memory (consumer cards) those of gfx942, which fit them. Triton's interpreter, which has no blocks to choose, too.
    """
    recorded = _recording.get()
    if recorded is not None:
        return recorded.architecture
    if _pretended:
        return _pretended[0]
    if device.type != "cuda" or torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    known = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return known.get(capability, "gfx942")


@torch.compiler.assume_constant_result  # torch.compile cannot trace how Triton looks up its settings
def interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on `device`; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "meta" and _recording.get() is not None:
        return None
    if _pretended and runs_nothing(device):
        return None
    if device.type == "cpu":
        return None if interpreted() else "Triton needs a GPU (on a CPU only its interpreter, TRITON_INTERPRET=1, runs)"
    if device.type != "cuda":
        return f"the Triton kernels do not run on {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need compute capability 8.0 (A100) or above"
    return None
