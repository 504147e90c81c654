"""One call of a linear mixer over ranks: all that it needs besides its tensors."""

from dataclasses import dataclass

from longtrain.parallel.linear.mixers import Mixer, Sizes
from longtrain.parallel.scan import ScanPlan
from longtrain.parallel.shard import SequenceShard


@dataclass(frozen=True, eq=False)
class ScanCall:
    """Options of a call, the same on all ranks of the group."""

    mixer: Mixer
    sizes: Sizes
    shard: SequenceShard
    plan: ScanPlan
    scale: float
    strategy: str  # "allgather", "alltoall", "chain" or "ulysses"
    backend: str
    return_state: bool
    initial: bool  # a state enters the first token
    initial_gradient: bool  # it wants its gradient

    @property
    def exchanges(self) -> bool:
        """Whether anybody needs a state of another rank: not one rank alone, nor documents that end where ranks end."""
        return self.shard.world > 1 and (self.plan.crosses or (self.return_state and bool(self.plan.runs)))
