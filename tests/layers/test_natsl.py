"""NAtS-L where choices go to extremes, what it sends, what it refuses, and what it says about a step."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.layers import LayerPlace
from longtrain.layers.mixers.natsl import SHARE, NATSLConfig, NATSLMixer
from longtrain.layers.pattern import LayersConfig
from longtrain.layers.routing import routed_chunks
from longtrain.model import Decoder, ModelConfig, count_parameters
from longtrain.parallel import SequenceShard, count_messages
from tests.distributed import run_distributed
from tests.layers.mixer_cases import CU_SEQLENS, LENGTH, build, inputs, relative
from tests.layers.references.natsl import reference

CHUNK = 4
WAYS = ("softmax", "delta rule", "softmax at first", "softmax at last")


def plain() -> NATSLMixer:
    mixer = build("natsl", 0)
    assert isinstance(mixer, NATSLMixer)
    return mixer


def steered(way: str) -> tuple[NATSLMixer, Tensor, Tensor]:
    """A mixer whose chunks go where one channel of its input says, and input and output gradient."""
    mixer, (x, dy) = plain(), inputs()
    with torch.no_grad():
        mixer.scores.mul_(0.05)
        mixer.scores[:, :, 0] = torch.tensor([1.0, -1.0])
    signs = torch.full((LENGTH,), -1.0 if way == "delta rule" else 1.0, dtype=torch.float64)
    if way == "softmax at first":
        signs[12:] = -1  # a rank of three or four has them, or two have
    if way == "softmax at last":
        signs[:30] = -1
    x[..., 0] = 3 * signs
    return mixer, x, dy


def truth(way: str) -> list[Tensor]:
    mixer, x, dy = steered(way)
    x.requires_grad_()
    bounds = zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True)
    y = torch.cat([reference(mixer, x[0, a:b]) for a, b in bounds if b > a])[None]
    return [y.detach(), *torch.autograd.grad(y, [x, *mixer.parameters()], dy, materialize_grads=True)]


def spread(rank: int, world: int, layout: str) -> list[tuple[list[Tensor], tuple[float, float]]]:
    """For each way output and gradients, whole, and the measured sum and weight of all ranks."""
    import torch.distributed as dist

    results = []
    for way in WAYS:
        mixer, x, dy = steered(way)
        shard = SequenceShard(length=LENGTH, group=dist.group.WORLD, layout=layout, cu_seqlens=CU_SEQLENS)
        local = shard.split(x, dim=1).requires_grad_()
        y = mixer(local, shard)
        gradients = torch.autograd.grad(y, [local, *mixer.parameters()], shard.split(dy, dim=1), materialize_grads=True)
        share = torch.tensor(mixer.measured[SHARE], dtype=torch.float64)
        for part in (*gradients[1:], share):
            dist.all_reduce(part)
        whole = [shard.gather(y.detach(), dim=1), shard.gather(gradients[0], dim=1), *gradients[1:]]
        results.append((whole, tuple(share.tolist())))
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_all_none_and_one_ranks_chunks_to_softmax_are_the_papers_loop(world: int) -> None:
    wanted = [truth(way) for way in WAYS]
    for layout in ("contiguous", "zigzag"):
        for results in run_distributed(world, spread, layout):
            for way, (found, (sum_, weight)), exact in zip(WAYS, results, wanted, strict=True):
                for a, b in zip(found, exact, strict=True):
                    assert relative(a, b) < 1e-10 if b.norm() else not a.norm(), (layout, way)
                assert weight == 4 * (1 + 5 + 3)  # heads, and chunks that their document goes on after
                assert sum_ == 4 * {"softmax": 9, "delta rule": 0, "softmax at first": 2, "softmax at last": 3}[way]


def received(rank: int, world: int, way: str) -> tuple[int, int]:
    """Bytes of keys and values that a layer's forward receives, and what the chunks of ranks before are."""
    import torch.distributed as dist

    mixer = NATSLMixer(NATSLConfig(heads=2, attention_heads=4, chunk=CHUNK, strategy="allgather"), LayerPlace(32, 0, 1))
    length, width = 96, 32 // 4
    x = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(4))
    shard = SequenceShard(length=length, group=dist.group.WORLD)
    with torch.no_grad():
        mixer.scores.mul_(0.05)
        mixer.scores[:, :, 0] = torch.tensor([1.0, -1.0])
    counts = []
    for route in ("delta rule", way):
        x[..., 0] = {"delta rule": -3.0, "softmax": 3.0}.get(route, 0.0)
        if route == "third":
            x[..., 0] = -3.0
            x[:, 24:56, 0] = 3.0
        with count_messages() as counter, torch.no_grad():
            mixer(shard.split(x, dim=1), shard)
        counts.append(counter.received_bytes)
    routed = routed_chunks(shard, CHUNK, 2)
    bounds = [sum(routed.chunks.home.lengths[:other]) for other in range(world + 1)]
    before = np.arange(0, bounds[rank], CHUNK)
    chunks = len(before) if way == "softmax" else int(((before >= 24) & (before < 56)).sum())
    # For every token of a chunk K and V of four softmax heads, one channel for the choice, up to a multiple of 8.
    return counts[1] - counts[0], chunks * CHUNK * 4 * (width + 8 + width) * 4


@pytest.mark.parametrize("way", ["softmax", "third"])
def test_keys_and_values_that_went_to_softmax_travel_and_no_others(way: str) -> None:
    found = run_distributed(4, received, way)
    assert found[0] == (0, 0) and found[3][0] > 0
    for measured, expected in found:
        assert measured == expected


def test_a_choice_has_no_part_in_its_own_chunk() -> None:
    mixer, (x, dy) = plain(), inputs()
    shard = SequenceShard(length=LENGTH)
    y = mixer(x, shard)
    (gradient,) = torch.autograd.grad(y[:, :CHUNK], [mixer.scores], dy[:, :CHUNK], retain_graph=True)
    assert not gradient.any()
    (gradient,) = torch.autograd.grad(y[:, CHUNK:], [mixer.scores], dy[:, CHUNK:])
    assert gradient.any()


def test_equal_scores_choose_the_delta_rule() -> None:
    mixer, (x, _) = plain(), inputs()
    with torch.no_grad():
        mixer.scores.zero_()
        mixer(x, SequenceShard(length=LENGTH))
    assert mixer.measured[SHARE] == (0, 4 * (LENGTH // CHUNK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_heads": 6}, "attention_heads: got 6, it must be a multiple of heads = 4"),
        ({"attention_heads": 0}, "attention_heads: got 0, it must be a multiple of heads = 4"),
        ({"attention_heads": 12}, "key_width: got 8, attention_heads cuts it into 3, which must divide it"),
        (
            {"attention_heads": 8, "value_width": 7},
            "value_width: got 7, attention_heads cuts it into 2, which must divide it",
        ),
        ({"attention_heads": 32}, "key_width: got 8 for 8 softmax heads each, rotary positions need an even number"),
        ({"key_width": 0}, "key_width: got 0, it must be at least 1"),
        ({"value_width": -1}, "value_width: got -1, it must be at least 1"),
        ({"chunk": 0}, "chunk: got 0, it must be at least 1"),
        ({"conv_width": 0}, "conv_width: got 0"),
        ({"rope_base": 1.0}, r"rope_base: got 1.0, it must be above 1 \(null: no positions\)"),
        ({"strategy": "ring"}, "strategy: got 'ring', expected one of"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NATSLMixer.check(replace(NATSLConfig(heads=4), **options), LayerPlace(32, 0, 1))


@pytest.mark.parametrize(
    ("width", "mlp_width", "head", "parts", "millions"),
    [(1024, 2816, 128, 2, 380), (1536, 4096, 192, 3, 793)],  # the paper: 380M and about 800M
)
def test_the_papers_hybrid_models_have_their_size(
    width: int, mlp_width: int, head: int, parts: int, millions: int
) -> None:
    """The authors' configurations natsl_340M and natsl_760M (named without embeddings), H = 6, V = 2 K."""
    heads = {"heads": 6, "key_width": head, "value_width": 2 * head}
    layers = LayersConfig(
        pattern={"natsl": [3, 7, 11, 15, 19, 20], "default": "gated_deltanet"},
        mixers={"natsl": {**heads, "attention_heads": 6 * parts, "rope_base": None}, "gated_deltanet": heads},
    )
    config = ModelConfig(width=width, depth=21, mlp_width=mlp_width, tie_embedding=False)
    with torch.device("meta"):
        model = Decoder(config, layers, vocabulary=32_000)
    assert round(count_parameters(model) / 1e6) == millions
    # Their layer, by hand: q, k; v, gate, output; beta and decay; scores; weights; convolutions; norms; A and dt.
    keys, values, softmax_heads = 6 * head, 12 * head, 6 * parts
    projections = width * (2 * keys + 3 * values + 12 + 12) + keys * 2 * softmax_heads
    rest = 4 * (2 * keys + values) + 2 * (keys + values) // softmax_heads + 12
    assert count_parameters(model.blocks[3].get_submodule("mixer")) == projections + rest


def test_without_positions_any_width_works_and_ulysses_needs_heads_that_divide() -> None:
    NATSLMixer.check(NATSLConfig(heads=4, attention_heads=32, rope_base=None), LayerPlace(32, 0, 1))
    NATSLMixer.check_ranks(NATSLConfig(heads=4, strategy="ulysses"), strategy="ring", ranks=2, rows=1)
    with pytest.raises(ValueError, match="strategy: got 'ulysses' with 4 heads over 3 ranks"):
        NATSLMixer.check_ranks(NATSLConfig(heads=4, strategy="ulysses"), strategy="ring", ranks=3, rows=1)
