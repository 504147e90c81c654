"""A training step of the real program on pretended devices: what each would hold in memory, without any of them.

    held = longtrain.launch.dry_runs.dry_run("quickstart", ["data.length=65536"], world=8, architecture="sm_90")
    print(held.peak["total"], held.peak["working set"])

The step runs in a process of its own, with tensors that have shapes but no memory, and messages that go nowhere. It is
the trainer's, on the decoder that a training run would build, with every allocation of model, engine (DeepSpeed's own
code too), optimizer and operators; kernels are left out. What allocators round up or waste is not in it.
"""

import dataclasses
from dataclasses import dataclass

TERMS = (
    "weights",
    "gradients",
    "optimizer",
    "gathered weights",
    "layer inputs",
    "kept attention",
    "ring buffers",
    "loss",
    "working set",
)
"""What memory is held for; `dry_run.tracker.Term` says what each means. With "total" the keys of `Held`'s mappings."""


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds, by term and in total."""

    building: dict[str, int]  # at most, while the model was made
    peak: dict[str, int]  # when a training step holds most; the optimizer's state exists
    after: dict[str, int]  # between steps
    host_peak: int  # bytes on the host that tensors were offloaded to, at most
    tokens: int  # of the rank, in a micro-batch
    seconds: float  # that the dry run took


@dataclass(frozen=True)
class MixerHeld:
    """Bytes that a mixer's forward and backward pass hold, beside weights, their gradients, y and dy.

    Its policy says what is computed again when backward starts. Or a whole block's; dy is in `working` then.
    """

    remembered: float  # results of operators over ranks, from forward until backward,
    between: float  # and all else that is held until then
    results: float  # results of operators over ranks when backward starts, some of them computed again,
    kept: float  # what else is held for it then, beside
    input: float  # x, which it may keep or not
    working: float  # at the fullest moment of backward: what is neither of the others,
    ring: float  # what operators over ranks hold inside,
    kept_results: float  # and their results

    def __post_init__(self) -> None:
        assert min(dataclasses.astuple(self)) >= 0
