"""What every token mixer is: a module that maps x and its shard to y, with its own frozen options."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from longtrain.parallel import SequenceShard


@dataclass(frozen=True)
class LayerPlace:
    """Where in the model a mixer stands: some mixers' constants depend on it."""

    width: int  # D, the model's width
    index: int  # this layer, from 0
    depth: int  # number of layers


class Mixer(nn.Module, ABC):
    """A token mixer. A new one is one file in this folder with one subclass; it is found by its ``name``.

    A subclass names itself, gives a frozen dataclass of options (each with a default) and checks what its options ask
    for in ``check``, so that a recipe is refused when it is read rather than when the model is built.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]

    @classmethod
    @abstractmethod
    def check(cls, config: Any, place: LayerPlace) -> None:
        """Raise a ValueError ``"<option>: got ..., ..."`` when these options cannot work at this place."""

    @classmethod
    def check_ranks(cls, config: Any, *, strategy: str, ranks: int, rows: int) -> None:
        """Raise a ValueError ``"strategy: got ..., ..."`` when `ranks`, in `rows`, cannot share a sequence this way.

        strategy: the recipe's, for mixers that have none of their own.
        """

    @abstractmethod
    def __init__(self, config: Any, place: LayerPlace) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        """Mix tokens. x ``[B, T_w, D]``, this rank's tokens of ``shard`` -> y ``[B, T_w, D]``."""


class RecurrentMixer(Mixer):
    """A mixer that runs along the sequence and so needs runs of consecutive tokens on each rank.

    On a layout without them (striped) the input is moved to a contiguous layout and the output back, by one all-to-all
    each. Subclasses write ``mix`` and may rely on long segments.
    """

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        if shard.layout.long_segments:
            return self.mix(x, shard)
        home = shard.with_layout("contiguous")
        return home.relayout(self.mix(shard.relayout(x, home, dim=1), home), shard, dim=1)

    @abstractmethod
    def mix(self, x: Tensor, shard: SequenceShard) -> Tensor:
        """As ``forward``, on a shard whose layout keeps long segments."""
