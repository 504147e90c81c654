"""Starting a run by torchrun: on this node, of one or several; every node runs the same command with its own rank."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longtrain.launch.hosts import Command, Nodes, meeting_point, module, node_rank, variables

if TYPE_CHECKING:
    from longtrain.recipe import Recipe

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")  # what the command `torchrun` is


def command(recipe: "Recipe", nodes: Nodes, words: Sequence[str]) -> Command:
    """This node's torchrun of the training entry with the arguments `words`.

    Several nodes meet by fixed ranks, not by torchrun's rendezvous: that finds out who the meeting host is by names and
    addresses that a host may not know itself by.
    """
    options = ["--standalone"]
    if nodes.count > 1:
        host, port = meeting_point(recipe, nodes)
        options = [f"--nnodes={nodes.count}", f"--node_rank={node_rank(recipe, nodes)}"]
        options += [f"--master_addr={host}", f"--master_port={port}"]
    return Command((*TORCHRUN, *options, f"--nproc_per_node={nodes.per_node}", "-m", *module(words)), variables(nodes))
