"""Messages between the ranks that share a sequence; the only file of `parallel/` that sends any.

Every function takes a `group`: a process group of any subset of the processes, or None for this process alone. A
group of one sends no message. Ranks are counted inside the group. All ranks of a group must make the same calls in the
same order; sizes that one rank gives must match what the others give (the callers derive them from the same layout).

Nothing here is differentiable: callers are the forward and backward passes of autograd functions.

Messages carry bytes: nothing is converted or added on the way, so every dtype travels on every backend, and sums are
made on arrival, in the order of the ranks, whatever the timing. On NCCL, waiting makes the current stream wait, not the
host; its messages run on streams of its own, beside the kernels. Gloo moves host memory: tensors of another device are
staged through the host for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

Group = ProcessGroup | None


class Handle(Protocol):
    """A message under way. `wait` returns the received tensor, ready for the current stream; call it once."""

    def wait(self) -> Tensor: ...


@dataclass(frozen=True)
class Message:
    """One call that communicated: its kind and the bytes that this rank sent to and received from other ranks."""

    kind: str  # "all_gather", "all_to_all", "exchange", or "outer exchange" between the nodes of a grid
    sent_bytes: int
    received_bytes: int


@dataclass
class MessageCounter:
    """What this rank sent and received inside `with count_messages() as counter`."""

    messages: list[Message] = field(default_factory=list)

    def count(self, kind: str | None = None) -> int:
        """The number of calls that communicated, of one kind or of all."""
        return sum(kind is None or message.kind == kind for message in self.messages)

    @property
    def sent_bytes(self) -> int:
        return sum(message.sent_bytes for message in self.messages)

    @property
    def received_bytes(self) -> int:
        return sum(message.received_bytes for message in self.messages)


# The counters that listen now. A plain list, because backward passes run in autograd's own threads; it only records.
_counters: list[MessageCounter] = []


@contextmanager
def count_messages() -> Iterator[MessageCounter]:
    """Count the messages of this process, its backward passes included, until the block ends."""
    counter = MessageCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        # By identity: two counters that saw the same messages are equal.
        _counters[:] = [other for other in _counters if other is not counter]


def rank_and_size(group: Group) -> tuple[int, int]:
    """This process's rank in the group and the group's size; (0, 1) for None, also in a distributed run."""
    if group is None:
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


@dataclass(frozen=True, eq=False)
class Grid:
    """The ranks of a group in rows: rank = row * inner_size + place in the row.

    A row is a node, say: links inside it (`inner`) are faster than those between rows (`outer`, the ranks with this
    rank's place in every row). A plain group is one row. The groups are None in a group of one and where nothing is
    sent.
    """

    group: Group
    outer: Group
    inner: Group
    outer_size: int
    inner_size: int

    def row(self, rank: int) -> int:
        return rank // self.inner_size

    def silent(self) -> "Grid":
        """A grid of the same shape that has no groups to send in."""
        return Grid(None, None, None, self.outer_size, self.inner_size)


def grid_of(group: "Group | DeviceMesh") -> Grid:
    """The ranks meant by a group, a DeviceMesh of one or two (outer, inner) dimensions, or None (this process alone).

    Anything else is a ValueError. A two-dimensional mesh that does not hold all processes gets a group of all its ranks
    the first time (a collective call of the mesh's processes); `build_mesh` makes that group beforehand.
    """
    names = (group.mesh_dim_names or ()) if isinstance(group, DeviceMesh) else ()
    if isinstance(group, DeviceMesh) and group.ndim == 2 and "data" not in names:
        outer_size, inner_size = group.shape
        return Grid(_flat_group(group), group.get_group(0), group.get_group(1), outer_size, inner_size)
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: got a DeviceMesh of {group.ndim} dimensions {names}, expected one, such as mesh['sequence'], "
                "or two that share the sequence, (outer, inner)"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not a member of the group; only members can hold a part of a sequence")
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(f"group: got {group!r}, expected a ProcessGroup, a DeviceMesh of 1 or 2 dimensions or None")
    return Grid(group, None, group, 1, rank_and_size(group)[1])


def _flat_group(mesh: DeviceMesh) -> Group:
    """The group of all ranks of a two-dimensional mesh, in the mesh's order."""
    ranks = mesh.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(f"group: got a DeviceMesh of ranks {mesh.mesh.tolist()}, expected them in increasing order")
    if ranks == list(range(dist.get_world_size())):
        return dist.group.WORLD
    if not mesh.mesh_dim_names:
        raise ValueError("group: got a DeviceMesh without dimension names, expected mesh_dim_names=('outer', 'inner')")
    return mesh._flatten().get_group()


def same_group(one: Group, other: Group) -> bool:
    """Whether both are the same group, or both this process alone."""
    if one is None or other is None:
        return one is other
    return one is other or one.group_name == other.group_name


def process_count() -> int:
    """The number of processes in the whole run; a RuntimeError where torch.distributed was not initialised."""
    if not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised; call torch.distributed.init_process_group first")
    return dist.get_world_size()


def all_gather_parts(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """Every rank's rows, one rank after the other: [sizes[rank], ...] on each rank -> [sum(sizes), ...] on all.

    sizes: the rows of each rank, the same list everywhere. The result is new, except in a group of one, where it is x.
    """
    rank, world = rank_and_size(group)
    _check_rows(x, sizes[rank], f"sizes[{rank}]")
    if world == 1:
        return x
    most = max(sizes)
    if x.shape[0] < most:  # backends gather equal parts only
        padded = x.new_zeros((most, *x.shape[1:]))
        padded[: x.shape[0]] = x
        x = padded
    stacked = all_gather_stacked(x, group).wait()
    if min(sizes) == most:
        return stacked.flatten(0, 1)
    return torch.cat([part[:size] for part, size in zip(stacked, sizes, strict=True)])


def reduce_scatter_parts(x: Tensor, sizes: Sequence[int], group: Group) -> Tensor:
    """This rank's rows of x summed over the ranks: [sum(sizes), ...] on each rank -> [sizes[rank], ...].

    The sum runs in the order of the ranks in float32 (in x's own dtype if that is wider), which is the dtype of the
    result too: the caller rounds once. x travels as it is.
    """
    rank, world = rank_and_size(group)
    _check_rows(x, sum(sizes), "sum(sizes)")
    own = sizes[rank]
    received = all_to_all_parts(x, sizes, [own] * world, group)
    total = received[:own].to(accumulation_dtype(x.dtype), copy=True)
    for other in range(1, world):
        total += received[other * own : (other + 1) * own]
    return total


def all_to_all_parts(x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group) -> Tensor:
    """Rows sent to and received from every rank: [sum(send_sizes), ...] -> [sum(receive_sizes), ...].

    The rows for rank 0 come first, then those for rank 1 and so on; likewise in the result. send_sizes[r] here must be
    receive_sizes[this rank] on rank r. Sizes may be zero. The result is new, except in a group of one, where it is x.
    """
    return start_all_to_all_parts(x, send_sizes, receive_sizes, group).wait()


def start_all_to_all_parts(x: Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int], group: Group) -> Handle:
    """`all_to_all_parts`, begun: `wait()` gives its result. Do not write to x before."""
    rank, world = rank_and_size(group)
    _check_rows(x, sum(send_sizes), "sum(send_sizes)")
    if world == 1:
        return _Done(x)
    row = _bytes_per_row(x)
    result = x.new_empty((sum(receive_sizes), *x.shape[1:]))
    if row == 0:
        return _Done(result)
    transport = _Transport(group, x.device)
    send, receive = transport.outgoing(x), transport.incoming(result)
    send_bytes, receive_bytes = [size * row for size in send_sizes], [size * row for size in receive_sizes]
    work = dist.all_to_all_single(receive, send, receive_bytes, send_bytes, group=group, async_op=True)
    _record("all_to_all", sum(send_bytes) - send_bytes[rank], sum(receive_bytes) - receive_bytes[rank])
    return _Pending(work, transport, receive, result, keep=send)


def all_gather_stacked(x: Tensor, group: Group) -> Handle:
    """Start to gather a tensor of the same shape from every rank; `wait()` on the handle gives [W, *x.shape].

    Work between the call and `wait` overlaps with the messages. Do not write to x before; in a group of one, where the
    result is x's own memory, not afterwards either.
    """
    _, world = rank_and_size(group)
    if world == 1:
        return _Done(x.detach().unsqueeze(0))
    result = x.new_empty((world, *x.shape))
    if x.numel() == 0:
        return _Done(result)
    transport = _Transport(group, x.device)
    send, receive = transport.outgoing(x), transport.incoming(result)
    # torch 2.13 calls it all_gather_single and warns of the name that torch 2.11 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work = gather(receive, send, group=group, async_op=True)
    _record("all_gather", (world - 1) * send.numel(), (world - 1) * send.numel())
    return _Pending(work, transport, receive, result, keep=send)


def all_gather_bytes(data: bytes, group: Group, *, device: torch.device) -> list[bytes]:
    """Every rank's `data`, of any lengths, in the order of the ranks; on any backend that serves `device`.

    The host waits for the answer: for handshakes, not for the step's path.
    """
    _, world = rank_and_size(group)
    if world == 1:
        return [data]
    lengths = all_gather_stacked(torch.tensor([len(data)], device=device), group).wait().flatten().tolist()
    parts = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    everything = all_gather_parts(parts.to(device), lengths, group).cpu()
    return [bytes(part.tolist()) for part in everything.split(lengths)]


class Exchange:
    """Tensors sent to and received from single ranks, all at once; made when it starts, done after `wait`.

    sends, receives: (rank, tensor) pairs. The tensors that go from one rank to another are matched in order, and must
    agree in bytes. Those without elements are not sent. On NCCL the group must have communicated before (a handshake
    will do) unless all of its ranks take part. kind: how messages are counted.

        exchange = Exchange([(right, k)], [(left, k_next)], group)
        ...                       # compute with k; do not write to it, nor touch k_next
        exchange.wait()           # now k_next holds what the rank on the left sent
    """

    def __init__(
        self,
        sends: Sequence[tuple[int, Tensor]],
        receives: Sequence[tuple[int, Tensor]],
        group: Group,
        *,
        kind: str = "exchange",
    ) -> None:
        self._works: list[dist.Work] = []
        self._deliveries: list[tuple[_Transport, Tensor, Tensor]] = []
        self._keep: list[Tensor] = []  # what the backend still reads
        rank, world = rank_and_size(group)
        sends, receives = [pair for pair in sends if pair[1].numel()], [pair for pair in receives if pair[1].numel()]
        for _, tensor in receives:
            if not tensor.is_contiguous():
                raise ValueError(f"receive: got a tensor of strides {tensor.stride()}, expected contiguous buffers")
        self._copy_own(rank, sends, receives)
        away = [(peer, x) for peer, x in sends if peer != rank], [(peer, x) for peer, x in receives if peer != rank]
        if world == 1 or not any(away):
            return
        assert group is not None
        operations: list[dist.P2POp] = []
        sent, received = 0, 0
        for peer, tensor in away[0]:
            transport = _Transport(group, tensor.device)
            data = transport.outgoing(tensor)
            self._keep.append(data)
            operations.append(_operation(dist.isend, data, peer, group))
            sent += data.numel()
        for peer, tensor in away[1]:
            transport = _Transport(group, tensor.device)
            data = transport.incoming(tensor)
            self._deliveries.append((transport, data, tensor))
            operations.append(_operation(dist.irecv, data, peer, group))
            received += data.numel()
        self._works = dist.batch_isend_irecv(operations)
        _record(kind, sent, received)

    def wait(self) -> None:
        """Wait until everything was sent and received."""
        for work in self._works:
            work.wait()
        for transport, data, tensor in self._deliveries:
            transport.deliver(data, tensor)
        self._works, self._deliveries, self._keep = [], [], []

    @staticmethod
    def _copy_own(rank: int, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> None:
        own_sends, own_receives = [x for peer, x in sends if peer == rank], [x for peer, x in receives if peer == rank]
        for source, target in zip(own_sends, own_receives, strict=True):
            target.copy_(source)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over ranks and steps are kept: float32 for narrower floats, otherwise `dtype` itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


class _Done:
    """A handle on a result that needed no message."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def wait(self) -> Tensor:
        return self._result


class _Pending:
    """A handle on a collective under way; it keeps alive what the backend still reads."""

    def __init__(
        self, work: dist.Work | None, transport: "_Transport", receive: Tensor, result: Tensor, *, keep: Tensor
    ) -> None:
        assert work is not None  # None is for processes outside the group, which rank_and_size would have told
        self._work, self._transport, self._receive, self._result, self._keep = work, transport, receive, result, keep

    def wait(self) -> Tensor:
        self._work.wait()
        self._transport.deliver(self._receive, self._result)
        return self._result


class _Transport:
    """How tensors of one device travel in a group: as flat bytes, in place or through host memory."""

    def __init__(self, group: Group, device: torch.device) -> None:
        # "cpu:gloo,cuda:nccl": which backend serves which device type
        backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        backend = backends.get(device.type)
        self._staged = device.type != "cpu" and (backend == "gloo" or (backend is None and "cpu" in backends))
        if backend is None and not self._staged:
            raise ValueError(
                f"group: its backends ({', '.join(f'{k}: {v}' for k, v in backends.items())}) cannot move tensors on "
                f"{device}; move them to one of these devices, or make the group with a backend for {device.type!r}"
            )

    def outgoing(self, x: Tensor) -> Tensor:
        """x as flat bytes that the backend may read; the host waits for x if it is staged."""
        data = x.detach().contiguous().view(-1).view(torch.uint8)
        return data.cpu() if self._staged else data

    def incoming(self, target: Tensor) -> Tensor:
        """Flat bytes that the backend may write: the memory of the contiguous `target`, or a host buffer for it."""
        data = target.detach().view(-1).view(torch.uint8)
        return torch.empty_like(data, device="cpu") if self._staged else data

    def deliver(self, data: Tensor, target: Tensor) -> None:
        """Copy a host buffer that was received to `target`; nothing to do where the backend wrote in place."""
        if self._staged:
            target.detach().view(-1).view(torch.uint8).copy_(data)


def _operation(call: Callable[..., Any], data: Tensor, peer: int, group: ProcessGroup) -> dist.P2POp:
    return dist.P2POp(call, data, dist.get_global_rank(group, peer), group)


def _bytes_per_row(x: Tensor) -> int:
    row = x.element_size()
    for size in x.shape[1:]:
        row *= size
    return row


def _check_rows(x: Tensor, rows: int, name: str) -> None:
    if x.dim() == 0 or x.shape[0] != rows:
        raise ValueError(f"x: got shape {list(x.shape)}, expected {name} = {rows} rows")


def _record(kind: str, sent_bytes: int, received_bytes: int) -> None:
    for counter in _counters:
        counter.messages.append(Message(kind, sent_bytes, received_bytes))
