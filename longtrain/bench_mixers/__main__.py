"""One worker of `longtrain bench mixers` (see `longtrain.bench_common.worker`)."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.bench_common import measuring, worker
from longtrain.bench_common.comparing import deviations, squares
from longtrain.bench_mixers import sides
from longtrain.bench_mixers.cases import Case, draw
from longtrain.errors import leave
from longtrain.parallel import SequenceShard, count_messages


class Counted:
    """A side that counts the bytes that this rank receives in each pass, those of the latest run."""

    def __init__(self, side: sides.Side) -> None:
        self._side = side
        self.received = {"forward": 0, "backward": 0}

    def run(self) -> sides.Results:
        with count_messages() as forward:
            out = self._side.forward()
        with count_messages() as backward:
            results = self._side.backward(out)
        self.received = {"forward": forward.received_bytes, "backward": backward.received_bytes}
        return results


class Worker(worker.Worker):
    """A rank, the sides that it has been told to prepare, and the inputs that they share."""

    def __init__(self, rank: int, world: int, group: worker.Group, device: torch.device) -> None:
        super().__init__(rank, world, group, device)
        self._sides: dict[str, Counted] = {}
        self._drawn: dict[tuple[str, int], Tensor] = {}  # by name and tokens

    def check(self, case: dict[str, Any], file: str, single: bool = False) -> dict[str, Any]:
        """Compare with the truth at a short length (see `sides.compare`).

        file: where the truth is, or is to be, so that it is found once. single: the one-device form.
        Answers what the one-device form loses to its dtype (relative errors) and this rank's squared norms; or
        {"refused": why} for a case that cannot run over these ranks.
        """
        shapes = Case.of(case)
        group = None if single else self._group
        try:
            make, shard = sides.maker(shapes, group=group, device=self._device, single=single)
        except ValueError as refusal:
            return {"refused": str(refusal)}
        if self._rank == 0 and not Path(file).exists():
            self._find_truth(shapes, Path(file))
        if group is not None:
            dist.barrier(group)
        found = torch.load(file)
        side = make(sides.own_tokens(shapes, shard, self._device))
        try:
            mine = side.run()
        except ValueError as refusal:
            return {"refused": str(refusal)}
        return {"losses": found["losses"], "squares": sides.compare(side, mine, found["truth"], shard, group)}

    def _find_truth(self, case: Case, file: Path) -> None:
        truth = sides.truth(case)
        make, shard = sides.maker(case, group=None, device=self._device, single=True)
        one_device = make(sides.own_tokens(case, shard, self._device)).run()
        losses = deviations(squares(one_device, truth))
        torch.save({"truth": truth, "losses": losses}, file)

    def prepare(self, side: str, case: dict[str, Any], single: bool = False) -> dict[str, Any]:
        """Make the inputs of a side, named `side`, and run it once to warm up."""
        shapes = Case.of(case)
        group = None if single else self._group
        make, shard = sides.maker(shapes, group=group, device=self._device, single=single)
        self._sides[side] = Counted(make(lambda name: self._own(name, shapes, shard)))
        measuring.seconds(self._sides[side], group=group, device=self._device)
        return {}

    def _own(self, name: str, case: Case, shard: SequenceShard) -> Tensor:
        """An input of as many tokens as this rank holds; drawn once for all sides."""
        key = name, shard.local_length
        if key not in self._drawn:
            self._drawn[key] = self._draw(name, case, shard)
        return self._drawn[key]

    def _draw(self, name: str, case: Case, shard: SequenceShard) -> Tensor:
        return draw(name, case, tokens=shard.local_length, device=self._device, part=self._rank)

    def measure(self, side: str) -> dict[str, Any]:
        """One timed run; seconds."""
        return {"seconds": measuring.seconds(self._sides[side], group=self._group, device=self._device)}

    def received(self, side: str) -> dict[str, Any]:
        """Bytes that this rank received in the passes of a side's latest run: "forward" and "backward"."""
        return dict(self._sides[side].received)

    def memory(self, case: dict[str, Any]) -> dict[str, Any]:
        """Peak bytes of this rank's inputs, call and backward pass."""
        shapes = Case.of(case)
        make, shard = sides.maker(shapes, group=self._group, device=self._device)
        peak = measuring.peak_bytes(lambda: make(lambda name: self._draw(name, shapes, shard)), self._device)
        return {"bytes": peak}

    def forget(self) -> dict[str, Any]:
        """Free the inputs of all sides."""
        self._sides.clear()
        self._drawn.clear()
        return {}

    def room(self) -> dict[str, Any]:
        """Bytes that are free on this rank's accelerator."""
        free, _ = torch.accelerator.get_memory_info(self._device)
        return {"bytes": free}


if __name__ == "__main__":
    leave(worker.serve("longtrain.bench_mixers", Worker, sys.argv[1:]))
