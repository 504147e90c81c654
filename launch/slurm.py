"""Starting a run by SLURM: an sbatch file made from the recipe, which starts torchrun on every node."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from longtrain.errors import UsageError
from longtrain.launch.hosts import Nodes, module
from longtrain.launch.local import for_ranks
from longtrain.launch.torchrun import TORCHRUN

if TYPE_CHECKING:
    from longtrain.recipe import Recipe


def find_nodes(recipe: "Recipe") -> Nodes:
    """What the job asks for: the machine that submits it need not look like those that run it."""
    launch = recipe.launch
    count = launch.nodes or 1
    if launch.slurm.gpus_per_node is not None:
        return Nodes(count, launch.slurm.gpus_per_node)
    if launch.device == "cuda":
        raise UsageError("launch.slurm.gpus_per_node: got none with launch.device=cuda, expected 1 or more")
    processes = launch.processes or (recipe.parallel.data or 1) * (recipe.parallel.sequence or 1)
    if processes % count:
        raise UsageError(f"launch.nodes: got {count}, it must divide the {processes} processes (launch.processes)")
    return Nodes(count, processes // count)


def sbatch_file(recipe: "Recipe", nodes: Nodes, words: Sequence[str]) -> str:
    """The text of the file that `sbatch` takes."""
    slurm = recipe.launch.slurm
    asked = {
        "job-name": f"longtrain-{recipe.recipe}",
        "nodes": nodes.count,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "output": "longtrain-%j.out",
    }
    variables = for_ranks({}, processes=nodes.per_node, alone=False, given={})
    del variables["OMP_NUM_THREADS"]  # of the machine that submits
    if slurm.cpus_per_node is not None:
        variables["OMP_NUM_THREADS"] = str(max(1, slurm.cpus_per_node // nodes.per_node))
    # The rank of a node is known on the node alone, so its shell fills it in.
    told = ["--node_rank=$SLURM_NODEID", "--master_addr=$MASTER_ADDR", "--master_port=$MASTER_PORT"]
    torchrun = [*TORCHRUN, f"--nnodes={nodes.count}", f"--nproc_per_node={nodes.per_node}"]
    inner = f"exec {shlex.join(torchrun)} {' '.join(told)} -m {shlex.join(module(words))}"
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in asked.items() if value is not None),
        "set -euo pipefail",
        *slurm.setup,
        *(f"export {name}={shlex.quote(value)}" for name, value in sorted(variables.items())),
        'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
        'export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"  # two jobs on one node do not meet',
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(inner)}",
    ]
    return "\n".join(lines) + "\n"


def submit(text: str) -> int:
    """Hand the file to sbatch, which says the job's number; its exit code."""
    if shutil.which("sbatch") is None:
        raise UsageError(
            "launch.launcher: got 'slurm', and there is no command sbatch here; longtrain train --print writes "
            "the file to be submitted elsewhere"
        )
    sys.stdout.flush()
    return subprocess.run(["sbatch"], input=text, text=True, check=False).returncode
