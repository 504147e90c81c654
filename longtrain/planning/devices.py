"""The devices that plans know, from devices.yaml: what one holds, computes and sends."""

import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from longtrain.errors import UsageError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device; devices.yaml explains the figures."""

    name: str
    memory: float  # bytes
    host_memory: float  # bytes of its node
    node: int  # devices of a node
    bfloat16: float
    float32: float
    share: float
    attention: float
    bandwidth: float
    inner: float
    outer: float
    host: float
    host_bandwidth: float
    architecture: str | None  # of its kernels; None: a CPU


@dataclass(frozen=True)
class Devices:
    """So many devices of one kind."""

    count: int
    device: Device

    @property
    def nodes(self) -> int:
        return -(-self.count // self.device.node)

    def __str__(self) -> str:
        return f"{self.count} x {self.device.name.upper()}"


def devices_named(text: str) -> Devices:
    """The devices meant by "8xh200", "h100" (one) or "2xcpu" (two processes here).

    Raises:
        UsageError: no such device, with the nearest name; no such number.
    """
    match = re.fullmatch(r"(?:(\d+) ?x ?)?([a-z0-9_-]+)", text.strip().lower())
    known = _known()
    if match is None:
        raise UsageError(f"--devices: got {text!r}, expected a number and a name such as 8xh200; {_listed(known)}")
    count, name = int(match[1] or 1), match[2]
    if name not in known:
        raise UsageError(f"--devices: no {name!r}{nearest(name, known)}; {_listed(known)}")
    if not 1 <= count <= 1_000_000:
        raise UsageError(f"--devices: got {count} devices, expected 1 to 1,000,000")
    device = known[name]
    if name == "cpu":  # processes share what this machine has
        device = replace(device, memory=device.host_memory / count)
    return Devices(count, device)


def _listed(known: dict[str, Device]) -> str:
    return f"there are {', '.join(known)}"


@cache
def _known() -> dict[str, Device]:
    read = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_name("devices.yaml")))
    assert isinstance(read, dict)
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    devices = {}
    for name, figures in read.items():
        sizes = {key: (here if figures[key] is None else figures[key]) * GIB for key in ("memory", "host_memory")}
        devices[str(name)] = Device(**{"name": str(name), **figures, **sizes})
    return devices
