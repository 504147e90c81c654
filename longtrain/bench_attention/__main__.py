"""One worker of `longtrain bench attention` (see `longtrain.bench_common.worker`)."""

import sys
from typing import Any

import torch

from longtrain.bench_attention import sides
from longtrain.bench_attention.cases import Case, inputs, squares
from longtrain.bench_attention.memory import peak_bytes
from longtrain.bench_attention.virtual import critical_path
from longtrain.bench_common import worker
from longtrain.bench_common.measuring import seconds
from longtrain.errors import leave
from longtrain.parallel import SequenceShard
from longtrain.parallel.attention.cost import Heads
from longtrain.parallel.attention.relaying import attention_shard


class Worker(worker.Worker):
    """A rank, and the sides that it has been told to prepare."""

    def __init__(self, rank: int, world: int, group: worker.Group, device: torch.device) -> None:
        super().__init__(rank, world, group, device)
        self._sides: dict[str, sides.Side] = {}

    def prepare(
        self, side: str, kind: str, case: dict[str, Any], layout: str = "", strategy: str = ""
    ) -> dict[str, Any]:
        """Make the inputs of a side, named `side`: of kind "longtrain", "single" or "rival"."""
        shapes = Case.of(case)
        if kind == "longtrain":
            self._sides[side] = sides.Longtrain(
                shapes, layout=layout, strategy=strategy, group=self._group, device=self._device
            )
        elif kind == "rival":
            self._sides[side] = sides.Rival(shapes, world=self._world, rank=self._rank, device=self._device)
        else:
            return {"backend": self._prepare_single(side, shapes)}
        return {}

    def _prepare_single(self, side: str, case: Case) -> str | None:
        """Take the fastest of SDPA's kernels; where there are several, each is run twice to see."""
        names = sides.sdpa_backends(case, self._device)
        candidates = [sides.Single(case, device=self._device, backend=name) for name in names]
        if len(candidates) > 1:
            times = [min(seconds(one, group=None, device=self._device) for _ in range(2)) for one in candidates]
            fastest = times.index(min(times))
            names, candidates = [names[fastest]], [candidates[fastest]]
        self._sides[side] = candidates[0]
        return names[0]

    def forget(self) -> dict[str, Any]:
        """Free the inputs of all sides."""
        self._sides.clear()
        return {}

    def measure(self, side: str) -> dict[str, Any]:
        """One timed run; seconds."""
        return {"seconds": seconds(self._sides[side], group=self._group, device=self._device)}

    def reference(self, side: str, file: str) -> dict[str, Any]:
        """Write a single process's results to a file, and tell what their dtype lost (relative error of each)."""
        single = self._sides[side]
        assert isinstance(single, sides.Single)
        results = single.run()
        torch.save(tuple(x.cpu().contiguous() for x in results), file)
        return {"losses": single.losses(results)}

    def compare(self, side: str, file: str) -> dict[str, Any]:
        """Run a side once and compare with the results in a file: squared norms (see `cases.squares`)."""
        mine = self._sides[side]
        truth = torch.load(file, mmap=True)
        return {"squares": squares(mine.run(), tuple(x[:, mine.positions] for x in truth))}

    def rival(self) -> dict[str, Any]:
        """The rival's version, None where it is not installed."""
        return {"version": sides.rival_version()}

    def small_truth(self, side: str, case: dict[str, Any]) -> dict[str, Any]:
        """A side's results at a small case against dense attention in float64 in this process: squared norms."""
        mine, shapes = self._sides[side], Case.of(case)
        *qkv, dout = inputs(shapes, torch.arange(shapes.length), torch.device("cpu"))
        q, k, v = (x.double().requires_grad_() for x in qkv)
        share = shapes.heads // shapes.kv_heads
        keys, values = (x.repeat_interleave(share, dim=2) for x in (k, v))
        scores = torch.einsum("bihk,bjhk->bhij", q, keys) * shapes.width**-0.5
        hidden = torch.ones(shapes.length, shapes.length, dtype=torch.bool).triu(1)
        out = torch.einsum("bhij,bjhk->bihk", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
        truth = out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())
        return {"squares": squares(mine.run(), tuple(x[:, mine.positions] for x in truth))}

    def choice(self, case: dict[str, Any], home: str, strategy: str) -> dict[str, Any]:
        """The layout on which attention should run by the cost model, for a sequence that lies on `home`."""
        shapes = Case.of(case)
        shard = SequenceShard(length=shapes.length, group=self._group, layout=home, cu_seqlens=shapes.boundaries)
        size = shapes.torch_dtype.itemsize
        sizes = Heads(1, shapes.heads, shapes.kv_heads, shapes.width, shapes.width, size)
        target = attention_shard(shard, sizes, device=self._device, layout="auto", strategy=strategy)
        return {"layout": target.layout.name}

    def memory(self, case: dict[str, Any], layout: str, strategy: str) -> dict[str, Any]:
        """Peak bytes of this rank's call."""
        peak = peak_bytes(Case.of(case), layout=layout, strategy=strategy, group=self._group, device=self._device)
        return {"bytes": peak}

    def virtual(self, case: dict[str, Any], layout: str, world: int, repeats: int) -> dict[str, Any]:
        """The critical path of `world` ranks (see `virtual.critical_path`)."""
        return critical_path(Case.of(case), layout=layout, world=world, repeats=repeats, device=self._device)


if __name__ == "__main__":
    leave(worker.serve("longtrain.bench_attention", Worker, sys.argv[1:]))
