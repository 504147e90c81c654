"""States go from run to run, point to point, in position order: fewest bytes, and as many steps as there are runs.

Only what a document carries on is sent: one that ends costs no message. Every rank knows the state after the last token
(where the call returns it) from the rank that holds that token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from longtrain.parallel.communication import Exchange
from longtrain.parallel.linear.call import ScanCall
from longtrain.parallel.linear.mixers import carry
from longtrain.parallel.scan import Run, handed_on


def states(
    transition: Tensor, state: Tensor, initial: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
    """As `allgather.states`; kept are this rank's own transitions."""
    runs, final = call.plan.runs, initial
    way = _Way(call, runs, like=state)
    way.expect_first()
    meanwhile()
    entering: list[Tensor | None] = [None] * len(call.plan.first)
    for index, run in way.own:
        incoming = way.receive(index) if run.continues else initial if index == 0 else None
        entering[run.slot] = incoming
        final = handed_on(run, state[run.slot], incoming, lambda run, x: carry(transition[run.slot], x))
        way.send(index, final)
    way.finish()
    if call.return_state:
        final = _from_one(final if runs[-1].rank == call.plan.rank else None, runs[-1].rank, state[0], call)
    return entering, final, transition


def gradients(
    own: Tensor, kept: Tensor, dfinal: Tensor | None, call: ScanCall, meanwhile: Callable[[], None]
) -> tuple[list[Tensor | None], Tensor | None]:
    """As `allgather.gradients`; the rank of the first token has the initial state's gradient."""
    runs = call.plan.runs
    way = _Way(call, runs[::-1], like=own)
    final = None if dfinal is None else _to_one(dfinal, runs[-1].rank, call)
    way.expect_first()
    meanwhile()
    leaving: list[Tensor | None] = [None] * len(call.plan.first)
    dinitial = None
    for index, run in way.own:
        incoming = way.receive(index) if way.joins(index) else final if index == 0 else None
        leaving[run.slot] = incoming
        outgoing = handed_on(run, own[run.slot], incoming, lambda run, x: carry(kept[run.slot], x, backward=True))
        way.send(index, outgoing)
        if run is runs[0]:
            dinitial = outgoing
    way.finish()
    return leaving, dinitial


def kept_shape(call: ScanCall) -> tuple[int, ...]:
    """``[R, B, H, *transition]``."""
    return call.plan.slots, call.sizes.batch, call.sizes.heads, *call.sizes.transition


class _Way:
    """The runs in the order in which something passes them, and what comes to and goes from this rank's.

    Receives are posted in that order, one at a time: so no rank waits for one that waits for it.
    """

    def __init__(self, call: ScanCall, runs: Sequence[Run], *, like: Tensor) -> None:
        """like: ``[R, ...]``, shaped as what goes from run to run."""
        self._runs, self._group, self._like = runs, call.shard.group, like
        self.own = [(index, run) for index, run in enumerate(runs) if run.rank == call.plan.rank]
        self._sent: list[Exchange] = []
        self._expected: tuple[int, Exchange, Tensor] | None = None

    def joins(self, index: int) -> bool:
        """Whether one document goes on between the run and the one before it on the way."""
        if index == 0 or index == len(self._runs):
            return False
        one, other = self._runs[index - 1], self._runs[index]
        return (other if one.start < other.start else one).continues

    def expect_first(self) -> None:
        """Start to receive what comes to this rank first."""
        for index, _ in self.own[:1]:
            if self.joins(index):
                self._expect(index)

    def receive(self, index: int) -> Tensor:
        """What the run before this rank's run `index` hands on."""
        if self._expected is None:
            self._expect(index)
        assert self._expected is not None and self._expected[0] == index
        _, exchange, buffer = self._expected
        self._expected = None
        exchange.wait()
        return buffer

    def send(self, index: int, x: Tensor) -> None:
        """Hand x on to the next run, where the document goes on there."""
        if self.joins(index + 1):
            self._sent.append(Exchange([(self._runs[index + 1].rank, x.contiguous())], [], self._group))

    def finish(self) -> None:
        """Wait until everything was sent."""
        for exchange in self._sent:
            exchange.wait()

    def _expect(self, index: int) -> None:
        buffer = self._like.new_empty(self._like.shape[1:])
        self._expected = index, Exchange([], [(self._runs[index - 1].rank, buffer)], self._group), buffer


def _from_one(x: Tensor | None, source: int, like: Tensor, call: ScanCall) -> Tensor:
    """What rank `source` has, on every rank."""
    others = [rank for rank in range(call.shard.world) if rank != source]
    if x is not None:
        x = x.contiguous()
        Exchange([(rank, x) for rank in others], [], call.shard.group).wait()
        return x
    received = torch.empty_like(like, memory_format=torch.contiguous_format)
    Exchange([], [(source, received)], call.shard.group).wait()
    return received


def _to_one(x: Tensor, target: int, call: ScanCall) -> Tensor | None:
    """On rank `target` the sum of what all ranks have, in their order; None on the others."""
    if call.plan.rank != target:
        Exchange([(target, x.contiguous())], [], call.shard.group).wait()
        return None
    parts = [x if rank == target else torch.empty_like(x) for rank in range(call.shard.world)]
    receives = [(rank, part) for rank, part in enumerate(parts) if rank != target]
    Exchange([], receives, call.shard.group).wait()
    return torch.stack(parts).sum(0)
