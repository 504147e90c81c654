"""Small models with every mixer, and what their passes return and send under a memory policy."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longtrain.layers import MIXERS
from longtrain.layers.pattern import LayersConfig
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.parallel import SequenceShard, count_messages

VOCABULARY = 61
BOUNDS = [0, 1, 9, 9, 30, 43]
EVERY_MIXER = tuple(MIXERS)
_OPTIONS = {
    name: {"heads": 4} if "heads" in mixer.Config.__dataclass_fields__ else {} for name, mixer in MIXERS.items()
}
_OPTIONS["moba"] |= {"block": 4, "picks": 2}  # so that there is something to pick
_OPTIONS["natsl"] |= {"chunk": 4}

Traffic = tuple[Counter[tuple[str, int]], Counter[tuple[str, int]]]
"""Messages of forward and of backward: how many of each kind and size in bytes."""


def model_of(
    memory: MemoryConfig,
    *,
    pattern: tuple[str, ...] = EVERY_MIXER,
    options: dict[str, Any] | None = None,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """One block for each mixer of the pattern; the weights depend on nothing else."""
    torch.manual_seed(3)
    layers = LayersConfig(pattern=list(pattern), mixers={name: _OPTIONS[name] for name in pattern} | (options or {}))
    model = Decoder(ModelConfig(width=width, depth=len(pattern)), layers, vocabulary=VOCABULARY, memory=memory)
    torch.nn.init.normal_(model.head.weight, std=0.2)  # zero at the start of a training, it would hide the rest
    return model.to(dtype)


def passes(model: Decoder, shard: SequenceShard) -> tuple[dict[str, Tensor], Traffic]:
    """Losses and plain gradients, by name, of a packed sequence on this rank's shard; and the messages."""
    seeded = torch.Generator().manual_seed(4)
    tokens, labels = (torch.randint(VOCABULARY, (1, shard.length), generator=seeded) for _ in range(2))
    labels[:, shard.length * 2 // 3 :] = -100  # ranks with nothing to predict
    with count_messages() as forward:
        losses = model(shard.split(tokens, dim=1), shard, shard.split(labels, dim=1))
    assert isinstance(losses, Tensor)
    with count_messages() as backward:
        losses.sum().backward()
    found = {"losses": losses.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found, (_counted(forward), _counted(backward))


def with_policy(recompute: Any, **others: Any) -> MemoryConfig:
    return replace(MemoryConfig(recompute=recompute), **others)


class Recorded:
    """Copies on the CPU in the place of those to an accelerator's host, and the order of all that happens."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self._numbers: dict[int, int] = {}
        self.hosts: list[Tensor] = []

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        host = x.clone()
        self.hosts.append(host)
        return host, self._happened("out", host)

    def back(self, host: Tensor) -> tuple[Tensor, Any]:
        return host.clone(), self._happened("back", host)

    def wait(self, mark: Any) -> None:
        self.events.append(("wait " + mark[0], mark[1]))

    def _happened(self, what: str, host: Tensor) -> tuple[str, int]:
        number = next(n for n, other in enumerate(self.hosts) if other is host)
        self.events.append((what, number))
        return what, number


def _counted(counter: Any) -> "Counter[tuple[str, int]]":
    return Counter((message.kind, message.sent_bytes) for message in counter.messages)
