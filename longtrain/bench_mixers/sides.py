"""What is measured: one forward and one backward pass of an operator or mixer; and the truth about them."""

import copy
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.bench_common.comparing import squares
from longtrain.bench_mixers.cases import FIXED, REPLICATED, Case, draw
from longtrain.bench_mixers.layers import build, layout_of
from longtrain.bench_mixers.operators import OPERATORS
from longtrain.parallel import SequenceShard

Group = dist.ProcessGroup | None
Source = Callable[[str], Tensor]  # the name of an input -> this rank's tokens of it
Results = dict[str, Tensor]
CPU = torch.device("cpu")


WEIGHT = "weight "  # before the names of a mixer's weights


class Side:
    """A call and the leaves that it reads; `run` is what is measured. dout: the gradient of its output."""

    def __init__(self, call: Callable[[], Tensor], leaves: Mapping[str, Tensor], dout: Tensor) -> None:
        self._call, self._leaves, self._dout = call, leaves, dout

    def forward(self) -> Tensor:
        return self._call()

    def backward(self, out: Tensor) -> Results:
        """out ``[1, T_w, ...]`` and this rank's part of the gradient of each leaf, by ``d`` and its name."""
        gradients = torch.autograd.grad(out, list(self._leaves.values()), self._dout)
        return {"out": out.detach(), **{f"d{name}": x for name, x in zip(self._leaves, gradients, strict=True)}}

    def run(self) -> Results:
        return self.backward(self.forward())

    @property
    def replicated(self) -> set[str]:
        """Results that are parts of a sum over ranks."""
        return {f"d{name}" for name in self._leaves if name in REPLICATED or name.startswith(WEIGHT)}


Maker = Callable[[Source], Side]


def maker(case: Case, *, group: Group, device: torch.device, single: bool = False) -> tuple[Maker, SequenceShard]:
    """What makes sides of a case from inputs, and the shard whose tokens these are.

    single: an operator in its one-device form, a mixer in this process alone; otherwise over the ranks of the group.
    """
    layout = "contiguous" if single else layout_of(case)
    shard = SequenceShard(length=case.length, group=None if single else group, layout=layout)
    if case.kind == "mixer":
        mixer = build(case).to(device)
        return lambda source: _mixer_side(mixer, shard, source), shard
    operator = OPERATORS[case.name]
    if single:
        return lambda source: _operator_side(case, source, lambda x: operator.one_device(x, "auto")), shard
    return lambda source: _operator_side(case, source, lambda x: operator.over_ranks(x, shard, case.strategy)), shard


def truth(case: Case) -> Results:
    """A case's results on the whole sequence in float64: of the operator's reference, or of its mixer in one process.

    On the CPU, token by token: for short sequences.
    """

    def source(name: str) -> Tensor:
        return whole(case, name).double()

    if case.kind == "operator":
        operator = OPERATORS[case.name]
        return _operator_side(case, source, lambda x: operator.one_device(x, "reference")).run()
    shard = SequenceShard(length=case.length, group=None, layout="contiguous")
    return _mixer_side(copy.deepcopy(build(case)).double(), shard, source).run()


def _operator_side(case: Case, source: Source, call: Callable[[Mapping[str, Tensor]], Tensor]) -> Side:
    operator = OPERATORS[case.name]
    inputs = {name: source(name).detach().requires_grad_(name not in FIXED) for name in operator.inputs}
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    return Side(lambda: call(inputs), leaves, source(operator.dout))


def _mixer_side(mixer: torch.nn.Module, shard: SequenceShard, source: Source) -> Side:
    x = source("x").detach().requires_grad_()
    weights = {WEIGHT + name: weight for name, weight in mixer.named_parameters()}
    return Side(lambda: mixer(x, shard), {"x": x, **weights}, source("dy"))


def whole(case: Case, name: str) -> Tensor:
    """An input of the whole sequence, the same numbers in every process whatever its device."""
    return draw(name, case, tokens=case.length, device=CPU)


def own_tokens(case: Case, shard: SequenceShard, device: torch.device) -> Source:
    """This rank's part of `whole` inputs."""

    def source(name: str) -> Tensor:
        x = whole(case, name)
        return (x if name in REPLICATED else shard.split(x, dim=1)).to(device)

    return source


def compare(side: Side, mine: Results, wanted: Results, shard: SequenceShard, group: Group) -> dict[str, list[float]]:
    """Squared norms of a rank's differences from the truth about the whole sequence, to be summed over ranks.

    What all ranks have a part of is summed first, and counted on the first rank.
    """
    summed = {name: mine[name].double() for name in mine if name in side.replicated}
    for part in summed.values():
        if group is not None:
            dist.all_reduce(part, group=group)
    rank = 0 if group is None else dist.get_rank(group)
    parts = {name: x.to(mine[name].device) for name, x in wanted.items()}
    found = {**mine, **summed}
    for name in wanted:
        if name not in summed:
            parts[name] = shard.split(parts[name], dim=1)
        elif rank > 0:
            found[name], parts[name] = (x.new_zeros(0) for x in (found[name], parts[name]))
    return squares(found, parts)
