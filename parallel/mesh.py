"""The grid of processes: copies of the model along one side, the ranks that share a sequence along the other."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longtrain.parallel.communication import Group, process_count


def build_mesh(device_type: str, *, data: int, sequence: int, rows: int = 1) -> DeviceMesh:
    """A mesh of `data` x `sequence` processes with the dimensions "data" and "sequence"; all processes call it, once.

    device_type: "cpu", "cuda" ...: where tensors live. Ranks that share a sequence have consecutive numbers, so they
    lie inside one node where they fit. rows: where they don't, the nodes that share a sequence: the mesh then has the
    dimensions "data", "outer" (its rows) and "inner" (the ranks of a row), and "sequence" for the last two together.
    `sequence_ranks(mesh)` is the group for a `SequenceShard`. All groups that shards send in are made here. A
    ValueError where the numbers do not fit the processes or each other.
    """
    processes = process_count()
    for name, degree in (("data", data), ("sequence", sequence), ("rows", rows)):
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ValueError(f"{name}: got {degree!r}, expected a number of ranks from 1 on")
    if data * sequence != processes:
        fitting = ", ".join(f"{processes // degree} x {degree}" for degree in _divisors(processes))
        raise ValueError(
            f"data, sequence: got {data} x {sequence} = {data * sequence} ranks for {processes} processes; "
            f"data x sequence can be {fitting}"
        )
    if sequence % rows:
        fitting = ", ".join(map(str, _divisors(sequence)))
        raise ValueError(f"rows: got {rows}, expected a divisor of sequence = {sequence}: {fitting}")
    if rows == 1:
        return init_device_mesh(device_type, (data, sequence), mesh_dim_names=("data", "sequence"))
    names = ("data", "outer", "inner")
    mesh = init_device_mesh(device_type, (data, rows, sequence // rows), mesh_dim_names=names)
    both = mesh["outer", "inner"]
    both._flatten("sequence")
    both._flatten()  # the one that shards ask for
    return mesh


def sequence_ranks(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a mesh of `build_mesh` that shares one sequence: one dimension, or two (outer, inner)."""
    return mesh["outer", "inner"] if "outer" in (mesh.mesh_dim_names or ()) else mesh["sequence"]


def is_fake(group: Group) -> bool:
    """Whether the group's messages go nowhere and come from nowhere: torch's "fake" backend, in dry runs."""
    return group is not None and "fake" in str(dist.get_backend_config(group))


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
