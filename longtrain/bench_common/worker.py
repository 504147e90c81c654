"""One worker of a benchmark: takes commands from a pipe, one at a time, and answers each.

It waits for a command in a blocking read, so that an idle worker takes no time from the one that is measured. Commands
and answers are JSON objects; {"failed": traceback} is the answer to what went wrong. `longtrain.launch.team` starts
workers and talks to them.
"""

import argparse
import json
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Group = dist.ProcessGroup | None


class Worker:
    """A rank; a benchmark's subclass adds its commands as public methods, which take and return JSON objects."""

    def __init__(self, rank: int, world: int, group: Group, device: torch.device) -> None:
        self._rank, self._world, self._group, self._device = rank, world, group, device

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do `command["do"]`, a public method, with the command's other entries."""
        try:
            return getattr(self, command.pop("do"))(**command)
        except Exception:  # the launcher shows it and ends all workers
            return {"failed": traceback.format_exc()}


def serve(module: str, make: Callable[[int, int, Group, torch.device], Worker], argv: Sequence[str] | None) -> int:
    """Join the group and answer commands until the pipe closes. make(rank, world, group, device): the worker."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description="One benchmark worker.")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--store", type=Path, required=True, help="file in which the ranks meet")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True, help="cpu, or the type of an accelerator")
    parser.add_argument("--pipe", type=int, required=True, help="file descriptor of the pipe")
    arguments = parser.parse_args(argv)
    pipe = Connection(arguments.pipe)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    if device.type != "cpu":
        device = torch.device(device.type, arguments.rank)
        torch.accelerator.set_device_index(arguments.rank)
    group = None
    if arguments.world > 1:
        dist.init_process_group(
            "gloo" if device.type == "cpu" else None,
            init_method=f"file://{arguments.store}",
            rank=arguments.rank,
            world_size=arguments.world,
            device_id=None if device.type == "cpu" else device,
        )
        group = dist.group.WORLD
    worker = make(arguments.rank, arguments.world, group, device)
    while True:
        try:
            command = json.loads(pipe.recv_bytes())
        except EOFError:
            return 0
        pipe.send_bytes(json.dumps(worker.answer(command)).encode())
