"""What a launcher runs and where: how many nodes, the processes of each, where they meet, and the command line."""

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from longtrain.errors import UsageError
from longtrain.launch.local import for_ranks, processes_for

if TYPE_CHECKING:
    from longtrain.recipe import Recipe

PORT = 29500  # where ranks of several hosts meet, unless launch.address says another


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what it adds to this process's environment."""

    words: tuple[str, ...]
    environment: Mapping[str, str]

    def text(self) -> str:
        """As a shell takes it, one variable a line."""
        variables = [f"{name}={shlex.quote(value)} \\" for name, value in sorted(self.environment.items())]
        return "\n".join([*variables, shlex.join(self.words)])

    def become(self) -> NoReturn:
        """Go on as this program: signals and its exit code are the launcher's own."""
        sys.stdout.flush()
        os.execvpe(self.words[0], list(self.words), {**os.environ, **self.environment})


@dataclass(frozen=True)
class Nodes:
    """The machines of a run."""

    count: int
    per_node: int  # processes on each
    hosts: tuple[str, ...] = ()  # by the hostfile, in its order

    @property
    def world(self) -> int:
        return self.count * self.per_node


def find_nodes(recipe: "Recipe") -> Nodes:
    """The nodes of a run: by launch.hostfile, or launch.nodes machines like this one.

    Raises:
        UsageError: the hostfile is missing or cannot be read, or contradicts launch.nodes or launch.processes.
    """
    launch = recipe.launch
    if launch.hostfile is None:
        count = launch.nodes or 1
        processes = processes_for(recipe)
        # On GPUs the count is of this machine; on CPU the recipe's, of all.
        shared = count > 1 and not _has_gpus(recipe)
        if shared and processes % count:
            raise UsageError(f"launch.nodes: got {count}, it must divide the {processes} processes (launch.processes)")
        return Nodes(count, processes // count if shared else processes)
    slots = read_hostfile(Path(launch.hostfile))
    if launch.nodes not in (None, len(slots)):
        raise UsageError(f"launch.nodes: got {launch.nodes}, but {launch.hostfile} lists {len(slots)} hosts")
    if len(set(slots.values())) > 1:
        told = ", ".join(f"{host} {count}" for host, count in slots.items())
        raise UsageError(
            f"launch.hostfile: {launch.hostfile} gives hosts different slots ({told}), expected as many each"
        )
    total = sum(slots.values())
    if launch.processes not in (None, total):
        raise UsageError(
            f"launch.processes: got {launch.processes}, but {launch.hostfile} has {total} slots; "
            f"launch.processes={total} would work, or other slots"
        )
    return Nodes(len(slots), total // len(slots), tuple(slots))


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, of lines `HOST slots=N` as deepspeed and MPI have them; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise UsageError(f"launch.hostfile: got {path}: {why}; it has a line `HOST slots=N` for each host") from error
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", line)
        if found is None:
            raise UsageError(f"launch.hostfile: {path}, line {number}: got {line!r}, expected `HOST slots=N`")
        if found[1] in slots:
            raise UsageError(f"launch.hostfile: {path}, line {number}: {found[1]} is there twice")
        slots[found[1]] = int(found[2])
    if not slots:
        raise UsageError(f"launch.hostfile: {path} names no host, expected a line `HOST slots=N` for each")
    return slots


def meeting_point(recipe: "Recipe", nodes: Nodes) -> tuple[str, int]:
    """Host and port of rank 0: launch.address, or the hostfile's first host; alone this machine and a free port."""
    given = recipe.launch.address
    if given is not None:
        host, _, port = given.rpartition(":")
        return (host, int(port)) if host else (port, PORT)
    if nodes.count == 1:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            return "127.0.0.1", listener.getsockname()[1]
    if not nodes.hosts:
        raise UsageError(
            f"launch.address: got none with launch.nodes={nodes.count}, expected HOST:PORT of the first node, or "
            "launch.hostfile, whose first host it is"
        )
    return nodes.hosts[0], PORT


def node_rank(recipe: "Recipe", nodes: Nodes) -> int:
    """Which of the nodes this one is: launch.node_rank, or its line in the hostfile."""
    rank = recipe.launch.node_rank
    if rank is None:
        own = {socket.gethostname(), socket.gethostname().partition(".")[0], socket.getfqdn()}
        found = [place for place, host in enumerate(nodes.hosts) if host in own]
        if nodes.count > 1 and not found:
            where = f"{recipe.launch.hostfile} has no line for {socket.gethostname()}" if nodes.hosts else "no hostfile"
            raise UsageError(f"launch.node_rank: got none and {where}; expected 0 to {nodes.count - 1} on each node")
        return found[0] if found else 0
    if rank >= nodes.count:
        raise UsageError(
            f"launch.node_rank: got {rank}, expected 0 to {nodes.count - 1}: there are {nodes.count} nodes"
        )
    return rank


def variables(nodes: Nodes) -> dict[str, str]:
    """What the ranks' environment gets beyond this process's, of what the user has not set."""
    return for_ranks({}, processes=nodes.per_node, alone=nodes.count == 1, given=os.environ)


def module(words: Sequence[str]) -> tuple[str, ...]:
    """The training entry and its arguments, as launchers of modules take it."""
    return ("longtrain.train", *words)


def _has_gpus(recipe: "Recipe") -> bool:
    if recipe.launch.device == "cpu":
        return False
    import torch

    return torch.cuda.device_count() > 0
