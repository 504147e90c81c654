"""Starting a run by deepspeed's launcher: on this node, on all nodes of a hostfile over ssh, or on each without ssh."""

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longtrain.errors import UsageError
from longtrain.launch.hosts import Command, Nodes, meeting_point, module, node_rank, variables

if TYPE_CHECKING:
    from longtrain.recipe import Recipe

DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner")  # what the command `deepspeed` is
NO_HOSTFILE = "/dev/null"  # alone, whatever stands in deepspeed's own default, /job/hostfile


def command(recipe: "Recipe", nodes: Nodes, words: Sequence[str]) -> Command:
    """This node's deepspeed of the training entry with the arguments `words`.

    Always with --num_gpus: without it deepspeed counts a CPU machine's NUMA nodes. Given launch.node_rank, it starts
    this node's ranks alone (--no_ssh); otherwise those of all nodes, by pdsh over ssh.

    Raises:
        UsageError: deepspeed is not installed, several nodes have no hostfile, or pdsh is missing.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "launch.launcher: got 'deepspeed', which is not installed here; pip install deepspeed, or "
            "launch.launcher=torchrun, would work"
        )
    host, port = meeting_point(recipe, nodes) if nodes.count == 1 or nodes.hosts else ("", 0)
    options = [f"--master_addr={host}", f"--master_port={port}", f"--num_gpus={nodes.per_node}"]
    if nodes.count == 1:
        options = [*options[1:], *([f"--hostfile={NO_HOSTFILE}"] if not nodes.hosts else [])]
    elif not nodes.hosts:
        raise UsageError(
            f"launch.hostfile: got none with launch.nodes={nodes.count}; deepspeed needs a file with a line "
            "`HOST slots=N` for each node"
        )
    if nodes.hosts:
        options += [f"--hostfile={recipe.launch.hostfile}", f"--num_nodes={nodes.count}"]
        if recipe.launch.node_rank is not None:
            options += ["--no_ssh", f"--node_rank={node_rank(recipe, nodes)}"]
        elif nodes.count > 1 and shutil.which("pdsh") is None:
            raise UsageError(
                "launch.launcher: got 'deepspeed', which reaches other nodes by pdsh, and no command pdsh is here; "
                "the same command on every node with launch.node_rank=0, 1, ... would work"
            )
    return Command((*DEEPSPEED, *options, "--module", *module(words)), variables(nodes))
