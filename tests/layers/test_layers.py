"""Layers that are not mixers, and the pattern that places mixers; what holds for every mixer is in test_mixers.py."""

import pytest
import torch
from torch.nn import functional as F

from longtrain.layers import LayerPlace, SequenceParallelAttention, SwiGLU, rotate
from longtrain.layers.mixers.lightning import LightningConfig, LightningMixer, head_log_decays
from longtrain.layers.mixers.softmax import SoftmaxConfig, SoftmaxMixer
from longtrain.layers.pattern import LayersConfig, plan_layers
from longtrain.parallel import SequenceShard, sequence_parallel_attention


def test_rotation_depends_on_distance_only_and_starts_anew_in_each_document() -> None:
    q, k = torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)
    near, far = (rotate(q, torch.tensor([5, 9]) + far) for far in (0, 1_000_000))
    near_k, far_k = (rotate(k, torch.tensor([2, 3]) + far) for far in (0, 1_000_000))
    torch.testing.assert_close((near * near_k).sum(-1), (far * far_k).sum(-1), rtol=1e-8, atol=1e-8)
    shard = SequenceShard(length=6, cu_seqlens=[0, 4, 6])
    assert shard.document_positions.tolist() == [0, 1, 2, 3, 0, 1]


def test_lightning_forgets_less_in_deeper_layers_and_later_heads() -> None:
    decays = torch.stack([head_log_decays(8, LayerPlace(width=64, index=i, depth=4)) for i in range(4)])
    assert (decays < 0).all() and (decays[1:] > decays[:-1]).all() and (decays[:, 1:] > decays[:, :-1]).all()


def test_attention_module_has_the_functions_numbers() -> None:
    q, k, v = (torch.randn(1, 11, heads, 8) for heads in (4, 2, 2))
    shard = SequenceShard(length=11, cu_seqlens=[0, 5, 11])
    sinks = torch.randn(4)
    options = {"window": (3, 0), "softcap": 5.0, "scale": 0.2}
    out = SequenceParallelAttention(**options)(q, k, v, shard, sinks=sinks)
    assert torch.equal(out, sequence_parallel_attention(q, k, v, shard, sinks=sinks, **options)[0])


def test_swiglu_and_its_gradient_are_the_equations() -> None:
    torch.manual_seed(5)
    mlp = SwiGLU(8, 12).double()
    x, dy = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    x.requires_grad_()
    gate, up = mlp.gate_up.weight[:12], mlp.gate_up.weight[12:]
    wanted = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down.weight.T
    weights = [x, *mlp.parameters()]
    found = mlp(x)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, weights, dy), torch.autograd.grad(wanted, weights, dy), strict=True):
        torch.testing.assert_close(a, b)


def test_patterns_repeat_over_depth() -> None:
    config = LayersConfig(pattern=["lightning", "softmax"], mixers={"softmax": {"heads": 2}})
    planned = plan_layers(config, width=32, depth=5)
    assert [mixer.name for mixer, _, _ in planned] == ["lightning", "softmax", "lightning", "softmax", "lightning"]
    assert [place.index for _, _, place in planned] == list(range(5))
    assert planned[1][1].heads == 2


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"pattern": ["lightening"]}, ("layers.pattern", "'lightening'", "'lightning'")),
        ({"mixers": {"softmax": {"head": 1}}}, ("layers.mixers.softmax.head", "'heads'")),
        ({"mixers": {"softmax": {"heads": 4.0}}}, ("layers.mixers.softmax.heads", "4.0", "whole number")),
        ({"mixers": {"softmax": {"heads": 5}}}, ("layers.mixers.softmax.heads", "5", "32")),
        ({"mixers": {"softmax": {"heads": 4, "head_width": 7}}}, ("head_width", "7", "even")),
        ({"mixers": {"softmax": {"heads": 4, "window": -1}}}, ("window", "-1")),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"heads": 0}}}, ("lightning.heads", "0")),
        ({"mixers": {"softmax": {"heads": 4, "softcap": 0.0}}}, ("softmax.softcap", "0.0")),
        ({"mixers": {"softmax": {"heads": 4, "rope_base": 1.0}}}, ("softmax.rope_base", "1.0")),
        (
            {"pattern": ["sliding_window"], "mixers": {"sliding_window": {"window": None}}},
            ("sliding_window.window", "null", "softmax"),
        ),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"decay": "deep"}}}, ("decay", "'deep'", "minimax")),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"norm": "rms"}}}, ("norm", "'rms'", "joint")),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"gate": "tanh"}}}, ("gate", "'tanh'", "linear")),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"lrpe": "last"}}}, ("lrpe", "'last'", "first")),
        ({"pattern": ["lightning"], "mixers": {"lightning": {"scale": 0.0}}}, ("lightning.scale", "0.0")),
        ({"pattern": ["retention"], "mixers": {"retention": {"head_width": 3}}}, ("retention.head_width", "3", "even")),
        ({"pattern": ["retention"], "mixers": {"retention": {"value_width": 1}}}, ("retention.value_width", "1")),
        ({"pattern": ["gla"], "mixers": {"gla": {"heads": 32}}}, ("gla.heads", "32", "key_width")),
        ({"pattern": ["gla"], "mixers": {"gla": {"key_width": 0}}}, ("gla.key_width", "0")),
        ({"pattern": ["gla"], "mixers": {"gla": {"gate_rank": 0}}}, ("gla.gate_rank", "0")),
        ({"pattern": ["gla"], "mixers": {"gla": {"gate_temperature": -1.0}}}, ("gla.gate_temperature", "-1.0")),
    ],
)
def test_bad_layers_are_refused_by_key(config: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        plan_layers(LayersConfig(**config), width=32, depth=2)
    assert all(part in str(refusal.value) for part in parts)


def test_rotations_are_learned_in_the_first_layer_only() -> None:
    config = LightningConfig(heads=4, lrpe="first")
    places = [LayerPlace(width=32, index=index, depth=2) for index in range(2)]
    first, second = (LightningMixer(config, place).theta for place in places)
    assert first is not None and first.shape == (32,) and second is None


@pytest.mark.parametrize("window", [None, 0, 5, 100])
@pytest.mark.parametrize("bounds", [[0, 43], [0, 1, 9, 9, 30, 43], [0, 0]])
def test_softmax_counts_the_visible_pairs(window: int | None, bounds: list[int]) -> None:
    place = LayerPlace(width=32, index=0, depth=1)
    config = SoftmaxConfig(heads=4, kv_heads=2, window=window)
    shard = SequenceShard(length=bounds[-1], cu_seqlens=bounds)
    pairs = shard.intervals(0, window=None if window is None else (window, 0)).area
    # A score and a value's part for each pair and head, K = V = 8.
    assert SoftmaxMixer.mixing_flops(config, place, bounds) == 4 * 4 * 8 * pairs / max(bounds[-1], 1)
