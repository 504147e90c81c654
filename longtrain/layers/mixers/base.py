"""What every token mixer is: a module that maps x and its shard to y, with its own frozen options.

Which class to take
    Mixer            Anything. Write ``forward(x, shard)``; softmax attention is one.
    RecurrentMixer   Runs along the sequence and needs consecutive tokens on each rank. Write ``mix(x, shard)``.
    StatefulMixer    A RecurrentMixer that generates with constant memory. Write ``scan(x, shard, state)``,
                     ``empty_state`` and ``mixing_flops``; training, prefill, prefill in pieces and steps are all this
                     one method, so they cannot disagree.
    SharingMixer     Hands tensors on to the mixer of the next layer, which may ask for them (keys and values, say).

A StatefulMixer in outline (``longtrain.layers.recurrence`` has the recurrences; a short convolution's state is its last
inputs):

    def empty_state(self, batch, device, dtype):
        return MemoryState.empty((batch, H, K, V), device, dtype)   # or a NamedTuple of its own, of tensors [B, ...]
                                                                    # and whole numbers such as the position
    def scan(self, x, shard, state):      # x [B, T_w, D]; state None: nobody wants it, return (y, None)
        q, k, v = ...
        o, memory = scan_linear_attention(q, k, v, log_decay, shard, None if state is None else state.memory)
        return self.out(o.flatten(2)), None if state is None else state.after(x.shape[1], memory)

House rules for mixers
    - The projection to the residual stream is an ``nn.Linear`` called ``out``: the model scales its first weights by
      depth. The model also draws the weights of every ``nn.Linear``; a mixer draws its other parameters itself, and
      its buffers are made in ``__init__`` by plain tensor operations (no ``.item()``), because parameters are counted
      on the meta device.
    - A parameter of two dimensions is a matrix between channels: Muon orthogonalises it, and it counts as a projection.
      Angles, rates and a convolution's filters are one-dimensional (viewed as they are needed).
    - A StatefulMixer's options include ``heads`` and ``strategy``, which its scan is called with (``self.strategy``).
    - Options are a frozen dataclass, each with a default and a comment; its types are int, float, bool, str or one of
      these or None. ``check`` refuses values, ``check_ranks`` strategies and degrees.
    - Positions are those inside the document and go on after a state: ``recurrence.positions(shard, x.device, state)``.
    - Norms with a weight are ``longtrain.layers.norm.RMSNorm``. Gates and decays are computed in float32
      (``recurrence.state_dtype``): half precision is too coarse near 1.
    - What a forward pass should tell in the run's metrics it names in ``measures`` and leaves in ``measured``.
    - ``tests/layers/references/<name>.py`` holds the paper's equations as a loop over tokens; the tests in
      ``tests/layers`` find the mixer and that file by themselves and say what is missing.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longtrain.layers.taking import Takes
from longtrain.parallel import SequenceShard
from longtrain.parallel.linear.calls import STRATEGIES

Boundaries = np.ndarray | Sequence[int]
"""Document boundaries [N+1] from 0 to T."""


@dataclass(frozen=True)
class LayerPlace:
    """Where in the model a mixer stands: some mixers' constants depend on it."""

    width: int  # D, the model's width
    index: int  # this layer, from 0
    depth: int  # number of layers
    meta: int = 0  # learned tokens in front of every document, the model's meta_tokens


class Mixer(nn.Module, ABC):
    """A token mixer. A new one is one file in this folder with one subclass; it is found by its ``name``.

    A subclass names itself, gives a frozen dataclass of options (each with a default) and checks what its options ask
    for in ``check``, so that a recipe is refused when it is read rather than when the model is built.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Any]]
    measures: ClassVar[tuple[str, ...]] = ()
    """Numbers about a step, ``<name>.<measure>`` in its metrics: means over tokens, layers and ranks."""
    measured: dict[str, tuple[float | Tensor, float | Tensor]]
    """For each, this rank's part (sum, weight) of the mean, from the last forward pass; see `longtrain.measures`."""
    takes_from: ClassVar[Mapping[str, Takes]] = {}
    """By another mixer's name, which weights of a trained one it can start from (``longtrain.linearisation``)."""

    takes_meta: ClassVar[bool] = False
    """Whether a model with it can have meta tokens: x is ``[B, M + T_w, D]`` then, M = ``place.meta`` of them first.

    They come before every document and depend on weights only, so each rank carries its own copy of them, and nothing
    of them travels; its gradient is that of the rank's own tokens.
    """

    # ---- what a recipe asks for -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def check(cls, config: Any, place: LayerPlace) -> None:
        """Raise a ValueError ``"<option>: got ..., ..."`` when these options cannot work at this place."""

    @classmethod
    def check_ranks(cls, config: Any, *, strategy: str, ranks: int, rows: int) -> None:
        """Raise a ValueError ``"strategy: got ..., ..."`` when `ranks`, in `rows`, cannot share a sequence this way.

        strategy: the recipe's, for mixers that have none of their own.
        """

    @classmethod
    def takes_shared(cls, config: Any) -> bool:
        """Whether it takes what the layer before hands on; both are SharingMixers then."""
        return False

    @classmethod
    def check_before(cls, config: Any, before: "tuple[type[Mixer], Any] | None") -> None:
        """Raise a ValueError ``"<option>: got ..., ..."`` where it cannot take what the layer before hands on.

        Asked only of mixers that take something. before: that layer's mixer and its options; None for the first layer.
        """

    @classmethod
    def pieces(cls, config: Any) -> tuple[str, int] | None:
        """The option that says into pieces of how many tokens it cuts a sequence, and how many; None: it cuts none.

        A recipe whose sequences are shorter than one piece is refused.
        """
        return None

    # ---- what it costs ----------------------------------------------------------------------------------------------

    @classmethod
    def count_parameters(cls, config: Any, place: LayerPlace) -> int:
        """Number of weights of a mixer with these options."""
        return sum(parameter.numel() for parameter in cls._on_meta(config, place).parameters())

    @classmethod
    def count_out(cls, config: Any, place: LayerPlace) -> int:
        """Number of weights of its projection to the residual stream, ``out`` (0: it has none of this name)."""
        return sum(p.numel() for name, p in cls._on_meta(config, place).named_parameters() if name == "out.weight")

    @classmethod
    def flops_per_token(cls, config: Any, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """Floating-point operations of forward per token, a multiply-add as 2, averaged over a sequence.

        cu_seqlens: the sequence's document boundaries, ``[N+1]`` from 0 to T. Counts projections (every weight matrix
        meets every token once) and mixing; norms, gates and activations are left out, as is usual.
        """
        matrices = sum(p.numel() for p in cls._on_meta(config, place).parameters() if p.ndim > 1)
        return 2.0 * matrices + cls.mixing_flops(config, place, cu_seqlens)

    @classmethod
    def mixing_flops(cls, config: Any, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """The part of ``flops_per_token`` where tokens meet: 0 unless a mixer says what it is."""
        return 0.0

    @classmethod
    def _on_meta(cls, config: Any, place: LayerPlace) -> "Mixer":
        with torch.device("meta"):
            return cls(config, place)

    # ---- training ---------------------------------------------------------------------------------------------------

    def prepare(self, shard: SequenceShard, *, device: torch.device, dtype: torch.dtype) -> None:
        """Do the host's work for ``forward`` on a new shard beforehand, in a data loader; by default there is none.

        device, dtype: where and in what ``forward`` will compute.
        """

    @abstractmethod
    def __init__(self, config: Any, place: LayerPlace) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        """Mix tokens. x ``[B, T_w, D]``, this rank's tokens of ``shard`` -> y ``[B, T_w, D]``."""

    # ---- generation (without gradients: states may be written to in place) -------------------------------------------

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        """Whether it has the three methods below, and whether the state's size grows with the text.

        "none": generation runs the whole text again for every token.
        """
        return "none"

    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The state before the first token of ``batch`` texts: a NamedTuple of tensors and whole numbers.

        dtype: that of x. States of recurrences are in ``state_dtype(dtype)``.
        """
        raise NotImplementedError(f"{self.name} keeps no state: its text is run again for every token")

    def prefill(self, x: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        """As ``forward`` on one device and one document, with the state after its last token.

        x ``[B, T, D]`` -> y ``[B, T, D]`` and the state. state: where an earlier piece of the same text ended (it may
        be written to: use the one that is returned); None at the text's beginning, where x begins with the meta tokens.
        """
        raise NotImplementedError(f"{self.name} keeps no state: its text is run again for every token")

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next token. x ``[B, D]`` -> y ``[B, D]`` and the state after it; ``state`` may be written to."""
        raise NotImplementedError(f"{self.name} keeps no state: its text is run again for every token")


class RecurrentMixer(Mixer):
    """A mixer that runs along the sequence and so needs runs of consecutive tokens on each rank.

    On a layout without them (striped) the input is moved to a contiguous layout and the output back, by one all-to-all
    each. Subclasses write ``mix`` and may rely on long segments.
    """

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        home = long_home(shard)
        if home is shard:
            return self.mix(x, shard)
        return home.relayout(self.mix(shard.relayout(x, home, dim=1), home), shard, dim=1)

    @abstractmethod
    def mix(self, x: Tensor, shard: SequenceShard) -> Tensor:
        """As ``forward``, on a shard whose layout keeps long segments."""


Shared = tuple[Tensor, ...]
"""What a layer hands on to the next one; empty where it does not."""


class SharingMixer(Mixer):
    """A mixer that hands tensors on to the next layer's mixer, which takes them if its ``takes_shared`` says so.

    They go from block to block as arguments and results, so that what is computed again in backward is the same.
    """

    @abstractmethod
    def mix_shared(self, x: Tensor, shard: SequenceShard, shared: Shared) -> tuple[Tensor, Shared]:
        """As ``forward``, with what the layer before handed on, and what this one does."""

    @abstractmethod
    def prefill_shared(self, x: Tensor, shard: SequenceShard, state: Any, shared: Shared) -> tuple[Tensor, Any, Shared]:
        """As ``prefill``, alike; what is handed on is for these tokens and may be written to by the next call."""

    @abstractmethod
    def step_shared(self, x: Tensor, state: Any, shared: Shared) -> tuple[Tensor, Any, Shared]:
        """As ``step``, alike."""

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        return self.mix_shared(x, shard, ())[0]

    def prefill(self, x: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        return self.prefill_shared(x, shard, state, ())[:2]

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.step_shared(x, state, ())[:2]


class StatefulMixer(RecurrentMixer):
    """A recurrent mixer with a state of fixed size, from which it can go on: memory and time per token stay constant.

    Subclasses write ``scan``, ``empty_state`` and ``mixing_flops``; see the head of this file.
    """

    strategy: str
    """How states cross ranks, an option of every stateful mixer; "auto" is the cost model's choice."""

    def __init__(self, config: Any, place: LayerPlace) -> None:
        super().__init__(config, place)
        self.strategy = config.strategy

    @classmethod
    def check_ranks(cls, config: Any, *, strategy: str, ranks: int, rows: int) -> None:
        check_scan_ranks(config.strategy, heads=config.heads, ranks=ranks, rows=rows)

    @abstractmethod
    def scan(self, x: Tensor, shard: SequenceShard, state: Any) -> tuple[Tensor, Any]:
        """Mix tokens from a state on.

        x: ``[B, T_w, D]``. shard: in training any with long segments. state: None in training: start every document
            from nothing and return None for the state. Otherwise the state before the first token, and shard is the
            whole of one document on one device (in a step its length is 1).

        Returns:
            y ``[B, T_w, D]`` and the state after the last token.
        """

    @classmethod
    @abstractmethod
    def mixing_flops(cls, config: Any, place: LayerPlace, cu_seqlens: Boundaries) -> float:
        """Floating-point operations per token of the recurrence: 4 H K V where a state is added to and read once."""

    @abstractmethod
    def empty_state(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The state before the first token of ``batch`` texts: a NamedTuple of tensors and whole numbers."""

    @property
    def state_kind(self) -> Literal["none", "growing", "constant"]:
        return "constant"

    def mix(self, x: Tensor, shard: SequenceShard) -> Tensor:
        return self.scan(x, shard, None)[0]

    def prefill(self, x: Tensor, shard: SequenceShard, state: Any = None) -> tuple[Tensor, Any]:
        check_prompt(shard)
        if state is None:
            state = self.empty_state(x.shape[0], x.device, x.dtype)
        return self.scan(x, shard, state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.scan(x[:, None], ONE_TOKEN, state)
        return y[:, 0], state


def long_home(shard: SequenceShard) -> SequenceShard:
    """Where a recurrence runs: the shard itself, or a contiguous one if its layout has no long segments."""
    return shard if shard.layout.long_segments else shard.with_layout("contiguous")


ONE_TOKEN = SequenceShard(length=1)
"""The shard of a step."""


def check_prompt(shard: SequenceShard) -> None:
    """Refuse, with a ValueError, a shard that is not the whole of one document on one device."""
    if shard.world != 1 or shard.documents != 1:
        raise ValueError(
            f"shard: got {shard.documents} documents over {shard.world} ranks, prefill takes one document on one device"
        )


def check_heads(heads: int, head_width: int | None, place: LayerPlace) -> None:
    """Refuse, with a ValueError, head counts and widths that cannot work; None for the width is D / heads."""
    if heads < 1:
        raise ValueError(f"heads: got {heads}, it must be at least 1")
    if head_width is None:
        check_divides("heads", heads, "model.width", place.width)
    if head_width is not None and head_width < 1:
        raise ValueError(f"head_width: got {head_width}, it must be at least 1")


def check_divides(option: str, given: int, whole: str, total: int, *, otherwise: str = "") -> None:
    """Refuse, with a ValueError that says which numbers near it would work, one that does not divide the total.

    whole: the total's name. otherwise: what else would work, as ``" (or give key_width)"``.
    """
    if given < 1 or total < 1 or total % given:
        divisors = [d for d in range(1, total + 1) if total % d == 0]
        near = [d for d in divisors if d < given][-1:] + [d for d in divisors if d > given][:1]
        fits = " or ".join(map(str, near)) or "none"
        raise ValueError(f"{option}: got {given}, it must divide {whole} = {total}: {fits} would work{otherwise}")


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse, with a ValueError, a text that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{option}: got {value!r}, expected one of {', '.join(choices)}")


def check_scan_strategy(strategy: str) -> None:
    """Refuse, with a ValueError, what is no way for states to cross ranks."""
    check_choice("strategy", strategy, STRATEGIES)


def check_scan_ranks(strategy: str, *, heads: int, ranks: int, rows: int) -> None:
    """Refuse, with a ValueError, a way for states to cross ranks that so many, in rows, do not have."""
    if strategy == "ulysses" and rows > 1:
        raise ValueError(
            f"strategy: got 'ulysses' with parallel.rows = {rows}, expected 1; 'allgather', 'alltoall' and 'chain' "
            "work with any rows"
        )
    if strategy == "ulysses" and heads % ranks:
        raise ValueError(
            f"strategy: got 'ulysses' with {heads} heads over {ranks} ranks, which do not divide them; "
            "'allgather', 'alltoall' and 'chain' work with any heads"
        )
