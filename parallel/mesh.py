"""The grid of processes: copies of the model along one side, the ranks that share a sequence along the other."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longtrain.parallel.communication import process_count


def build_mesh(device_type: str, *, data: int, sequence: int) -> DeviceMesh:
    """A mesh of `data` x `sequence` processes with the dimensions "data" and "sequence"; all processes call it, once.

    device_type: "cpu", "cuda" ...: where tensors live. Ranks that share a sequence have consecutive numbers, so they
    lie inside one node where they fit; `mesh["sequence"]` is the group for a `SequenceShard`. Process groups are made
    here and nowhere else. A ValueError where data * sequence is not the number of processes.
    """
    processes = process_count()
    for name, degree in (("data", data), ("sequence", sequence)):
        if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
            raise ValueError(f"{name}: got {degree!r}, expected a number of ranks from 1 on")
    if data * sequence != processes:
        fitting = ", ".join(f"{processes // degree} x {degree}" for degree in _divisors(processes))
        raise ValueError(
            f"data, sequence: got {data} x {sequence} = {data * sequence} ranks for {processes} processes; "
            f"data x sequence can be {fitting}"
        )
    return init_device_mesh(device_type, (data, sequence), mesh_dim_names=("data", "sequence"))


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
