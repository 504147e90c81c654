"""Two hosts: two network namespaces joined by a pair of virtual interfaces, two ranks in each, a double ring over all.

What travels between the hosts is counted twice: by the ranks, and by the interface that the kernel gave each host.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longtrain.parallel import sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from tests.distributed import Place, run_in_places
from tests.namespaces import ADDRESSES, INTERFACES, Host, hosts  # noqa: F401 (pytest finds the fixture by its name)
from tests.parallel.attention_cases import Case, local_parts, over_ranks, relative_errors, shards, truths, whole_inputs

CASES = tuple(
    (strategy, Case(tokens=61, layout=layout, documents=documents, heads=4, groups=2, sinks=sinks))
    for strategy in ("ring", "mesh")
    for layout, documents, sinks in (("zigzag", None, True), ("balanced", (0, 7, 7, 40, 61), False))
)
# Large enough that headers and acknowledgements are little beside it: 256 KiB of K and V on each rank.
CROSSING = Case(tokens=1024, layout="zigzag", causal=False, heads=4, groups=4, key_width=32, value_width=32)


def _crossed(interface: str) -> int:
    """Bytes that this host has sent to the other one so far, as the kernel counts them."""
    with open("/proc/self/net/dev") as table:
        (line,) = [line for line in table if line.strip().startswith(f"{interface}:")]
    return int(line.partition(":")[2].split()[8])


def _check_results(mesh: DeviceMesh, cases: tuple[tuple[str, Case], ...], truth_of: list[dict[str, Tensor]]) -> None:
    for (strategy, case), truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, mesh, strategy), truth, mesh)
        assert max(errors.values()) <= 1e-10, (strategy, case, errors)


def _check_what_crosses(mesh: DeviceMesh, case: Case) -> int:
    """Bytes from this rank to the other host in forward: the keys that somebody there sees, once."""
    rank = dist.get_rank()
    shard, _ = shards(case, mesh)
    local = local_parts(whole_inputs(case), shard, None)
    with count_messages() as counter:
        q, k, v = (local[name].float() for name in "qkv")
        sequence_parallel_attention(q, k, v, shard, causal=case.causal, strategy="ring")
    across = [message for message in counter.messages if message.kind == "outer exchange"]
    assert len(across) == 1, counter.messages  # one other row, so one message with K and V in it
    there = range(2, 4) if rank < 2 else range(2)
    seen = [shard.as_rank(reader).intervals(rank, causal=case.causal) for reader in there]
    ends = [(keys.lo[keys.lo < keys.hi].min(), keys.hi.max()) for keys in seen if keys.area]
    shown = max(stop for _, stop in ends) - min(start for start, _ in ends) if ends else 0
    assert across[0].sent_bytes == 4 * case.groups * (case.key_width + case.value_width) * shown
    assert case.causal or shown == shard.local_length
    return across[0].sent_bytes


def _check(
    rank: int, world: int, cases: tuple[tuple[str, Case], ...], truth_of: list[dict[str, Tensor]]
) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    _check_results(mesh, cases, truth_of)
    _check_what_crosses(mesh, Case(tokens=61, layout="zigzag", heads=4, groups=2))
    dist.barrier()
    before = _crossed(INTERFACES[rank // 2])
    sent = _check_what_crosses(mesh, CROSSING)
    dist.barrier()
    return {
        "network": os.readlink("/proc/self/ns/net"),
        "sent": sent,
        "crossed": _crossed(INTERFACES[rank // 2]) - before,
    }


def test_a_double_ring_over_two_hosts(hosts: tuple[Host, Host]) -> None:  # noqa: F811
    places = [Place(hosts[rank // 2].enter, INTERFACES[rank // 2]) for rank in range(4)]
    truth_of = truths(tuple(case for _, case in CASES))
    facts = run_in_places(places, f"tcp://{ADDRESSES[0]}:29500", _check, CASES, truth_of, timeout=60)
    networks = [fact["network"] for fact in facts]
    assert networks[0] == networks[1] != networks[2] == networks[3] and os.readlink("/proc/self/ns/net") not in networks
    for first in (0, 2):
        # By the kernel's count too: a second copy for the neighbour would be twice as much.
        sent = facts[first]["sent"] + facts[first + 1]["sent"]
        crossed = [fact["crossed"] for fact in facts[first : first + 2]]
        assert all(sent <= bytes_ < 1.25 * sent for bytes_ in crossed), (sent, crossed)
