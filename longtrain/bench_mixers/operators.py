"""The operators over ranks that are measured, each with its one-device form and the name of its inputs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from longtrain import kernels, parallel
from longtrain.parallel import SequenceShard
from longtrain.parallel.linear.calls import STRATEGIES

Inputs = Mapping[str, Tensor]
SOFTMAX = "softmax"

__all__ = ["OPERATORS", "SOFTMAX", "STRATEGIES", "Inputs", "Operator"]


@dataclass(frozen=True)
class Operator:
    """An operator over ranks and on one device.

    inputs: names as in `cases.draw`, in the order of the arguments. dout: the name of its output's gradient.
    over_ranks: (inputs, shard, strategy) -> output. one_device: (inputs, backend) -> output.
    """

    inputs: tuple[str, ...]
    dout: str
    over_ranks: Callable[[Inputs, SequenceShard, str], Tensor]
    one_device: Callable[[Inputs, str], Tensor]


def _softmax() -> Operator:
    return Operator(
        ("q", "k", "v"),
        "dout",
        lambda x, shard, strategy: parallel.sequence_parallel_attention(x["q"], x["k"], x["v"], shard)[0],
        lambda x, backend: kernels.softmax_attention(x["q"], x["k"], x["v"], backend=backend)[0],
    )


def _linear(decay: str) -> Operator:
    def over_ranks(x: Inputs, shard: SequenceShard, strategy: str) -> Tensor:
        out, _ = parallel.sequence_parallel_linear_attention(x["q"], x["k"], x["v"], x[decay], shard, strategy=strategy)
        return out

    return Operator(
        ("q", "k", "v", decay),
        "dout",
        over_ranks,
        lambda x, backend: kernels.linear_attention(x["q"], x["k"], x["v"], x[decay], backend=backend)[0],
    )


def _delta(decay: str | None) -> Operator:
    def over_ranks(x: Inputs, shard: SequenceShard, strategy: str) -> Tensor:
        log_decay = None if decay is None else x[decay]
        out, _ = parallel.sequence_parallel_delta_rule(
            x["q"], x["unit_k"], x["v"], x["beta"], log_decay, shard, strategy=strategy
        )
        return out

    def one_device(x: Inputs, backend: str) -> Tensor:
        log_decay = None if decay is None else x[decay]
        return kernels.gated_delta_rule(x["q"], x["unit_k"], x["v"], x["beta"], log_decay, backend=backend)[0]

    inputs = ("q", "unit_k", "v", "beta")
    return Operator(inputs if decay is None else (*inputs, decay), "dout", over_ranks, one_device)


def _slot() -> Operator:
    names = ("q", "k", "v", "slot", "slot_decay")

    def over_ranks(x: Inputs, shard: SequenceShard, strategy: str) -> Tensor:
        q, k, v, slot, log_decay = (x[name] for name in names)
        return parallel.sequence_parallel_slot_attention(q, k, v, slot, log_decay, shard, strategy=strategy)[0]

    def one_device(x: Inputs, backend: str) -> Tensor:
        return kernels.gated_slot_attention(*(x[name] for name in names), backend=backend)[0]

    return Operator(names, "dout", over_ranks, one_device)


def _conv1d() -> Operator:
    names = ("x", "weight", "bias")

    def over_ranks(x: Inputs, shard: SequenceShard, strategy: str) -> Tensor:
        return parallel.sequence_parallel_conv1d(x["x"], x["weight"], x["bias"], shard, activation="silu")

    def one_device(x: Inputs, backend: str) -> Tensor:
        return kernels.causal_conv1d(*(x[name] for name in names), activation="silu", backend=backend)

    return Operator(names, "dy", over_ranks, one_device)


OPERATORS: Mapping[str, Operator] = {
    SOFTMAX: _softmax(),  # what the others stand beside
    "linear-fixed": _linear("head_decay"),
    "linear-token": _linear("token_decay"),
    "linear-channel": _linear("channel_decay"),
    "delta": _delta(None),
    "gated-delta": _delta("token_decay"),
    "channel-delta": _delta("channel_decay"),
    "slot": _slot(),
    "conv1d": _conv1d(),
}
