"""Softmax attention within a window: the softmax mixer with one by default."""

from dataclasses import dataclass
from typing import ClassVar

from longtrain.layers.mixers.base import LayerPlace
from longtrain.layers.mixers.softmax import SoftmaxConfig, SoftmaxMixer


@dataclass(frozen=True)
class SlidingWindowConfig(SoftmaxConfig):
    """Options of the sliding_window mixer: those of softmax."""

    window: int | None = 511  # tokens to the left that a query sees besides itself


class SlidingWindowMixer(SoftmaxMixer):
    """``y_i = W_o sum_j softmax_j(R(q_i) R(k_j)^T / sqrt(K)) v_j`` over i - window <= j <= i.

    "Longformer: The Long-Document Transformer", section 3.1, looking back only. Time per token does not grow
    with the sequence, and generation keeps the last window + 1 keys and values only.
    """

    name: ClassVar[str] = "sliding_window"
    Config: ClassVar[type[SlidingWindowConfig]] = SlidingWindowConfig

    @classmethod
    def check(cls, config: SoftmaxConfig, place: LayerPlace) -> None:
        if config.window is None:
            raise ValueError("window: got null, sliding_window needs a number of tokens; softmax has none")
        super().check(config, place)
