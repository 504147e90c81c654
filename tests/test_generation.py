"""Generation reads each token once and says what reading the whole text again says; its work does not grow."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longtrain import generation
from longtrain.data import BOUNDARY
from longtrain.generation import Reader, generate
from longtrain.layers import LayerPlace, Mixer
from longtrain.layers.pattern import LayersConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.parallel import SequenceShard

VOCABULARY = 50
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {"heads": 2},
    "sliding_window": {"heads": 2, "window": 5},
    "lightning": {"heads": 2, "lrpe": "all"},
    "gla": {"heads": 2},
}


def model(*pattern: str) -> Decoder:
    torch.manual_seed(0)
    layers = LayersConfig(list(pattern), {name: OPTIONS[name] for name in pattern})
    decoder = Decoder(ModelConfig(width=16, depth=2, tie_embedding=False), layers, vocabulary=VOCABULARY)
    torch.nn.init.normal_(decoder.head.weight)
    return decoder.eval()


def text(length: int) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def whole(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The logits after a text, from reading all of it at once."""
    return decoder(tokens[None], SequenceShard(length=len(tokens)))[0, -1]


class Forgetful(Mixer):
    """A mixer that keeps no state: the running mean of all tokens."""

    name = "forgetful"

    @classmethod
    def check(cls, config: Any, place: LayerPlace) -> None: ...

    def __init__(self) -> None:
        super().__init__(None, LayerPlace(16, 0, 1))

    def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


@pytest.mark.parametrize(
    ("pattern", "kind", "last"),
    [
        (("lightning", "gla"), "constant", None),
        (("lightning", "sliding_window"), "constant", None),
        (("lightning", "softmax"), "growing", 20),
        (("forgetful", "lightning"), "none", 20),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_whole_text(
    pattern: tuple[str, ...], kind: str, last: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "PIECE", 7)
    decoder = model(*(name for name in pattern if name in OPTIONS))
    if "forgetful" in pattern:
        decoder.blocks[0].mixer = Forgetful()
    assert decoder.state_kind == kind
    reader, tokens = Reader(decoder, context=20), text(40)
    torch.testing.assert_close(reader.read(tokens[:10]), whole(decoder, tokens[:10]), rtol=1e-5, atol=1e-5)
    for i in range(10, 40):  # past the context too: `last` tokens are seen
        seen = tokens[: i + 1] if last is None else tokens[: i + 1][-last:]
        torch.testing.assert_close(reader.read(tokens[i : i + 1]), whole(decoder, seen), rtol=1e-5, atol=1e-5)
    assert len(reader.text) <= 20


@pytest.mark.parametrize("pattern", [("lightning", "softmax"), ("gla",)])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@torch.no_grad()
def test_tokens_are_those_of_reading_the_whole_text_again(pattern: tuple[str, ...], temperature: float) -> None:
    decoder, prompt = model(*pattern), text(9)
    found = list(generate(decoder, prompt.numpy(), tokens=25, temperature=temperature, seed=3, context=100))
    generator, so_far = torch.Generator().manual_seed(3), prompt
    for token in found:
        logits = whole(decoder, so_far)
        expected = logits.argmax() if temperature == 0 else (logits / temperature).softmax(-1)
        if temperature:
            expected = torch.multinomial(expected, 1, generator=generator)
        assert token == int(expected)
        so_far = torch.cat((so_far, torch.tensor([token])))
    assert len(found) == 25


def test_it_ends_with_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    script = iter([7, 8, BOUNDARY, 9])
    monkeypatch.setattr(Reader, "read", lambda self, tokens: torch.eye(BOUNDARY + 1)[next(script)])
    found = list(generate(model("gla"), np.array([5]), tokens=9, temperature=0, seed=0, context=8))
    assert found == [7, 8]


class Work(TorchDispatchMode):
    """Counts operations and the numbers that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.numbers = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        self.numbers += sum(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))
        return result


@torch.no_grad()
def test_work_and_memory_per_token_are_the_same_at_100_and_100_000() -> None:
    decoder = model("lightning", "gla")
    tokens = text(100_001)
    found = {}
    for position in (100, 100_000):
        reader = Reader(decoder, context=64)
        reader.read(tokens[:position])
        with Work() as work:
            logits = reader.read(tokens[position : position + 1])
        states = [x for x in tree_leaves(reader.states) if isinstance(x, Tensor)]
        memory = sum(x.untyped_storage().nbytes() for x in states)
        found[position] = (work.operations, work.numbers, memory)
        assert all(state.position == position + 1 for state in reader.states or ())
        torch.testing.assert_close(logits, whole(decoder, tokens[: position + 1]), rtol=1e-5, atol=1e-5)
    assert found[100] == found[100_000]
