"""Hymba's meta tokens and shared keys in a model: the paper's numbers over ranks, in recompute and in generation."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longtrain.layers import LayerPlace
from longtrain.layers.mixers.hymba import HymbaConfig, HymbaMixer
from longtrain.layers.pattern import LayersConfig, named_layers
from longtrain.memory import MemoryConfig
from longtrain.model import Decoder, ModelConfig
from longtrain.parallel import SequenceShard
from tests.distributed import run_distributed
from tests.layers.mixer_cases import relative
from tests.layers.references.hymba import layer
from tests.layers.references.pieces import normed, silu
from tests.parallel.comparing import world_group

VOCABULARY, LENGTH, BOUNDS = 23, 31, [0, 1, 8, 8, 22, 31]
NEAR: dict[str, Any] = {"mixer": "hymba", "heads": 4, "kv_heads": 2, "window": 5, "state_width": 4}
MIXERS: dict[str, dict[str, Any]] = {
    "wide": {**NEAR, "window": None},
    "near": NEAR,
    "reader": {**NEAR, "share_kv": True},
}
PATTERN = {"wide": [0, -1], "reader": [2, 3], "default": "near"}  # the third reader reads what the second one read
META = {2: "fewer than the convolution sees", 5: "more"}


def model_of(meta: int, *, recompute: Any = "none", dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(1)
    config = ModelConfig(width=32, depth=5, mlp_width=24, tie_embedding=False, meta_tokens=meta)
    layers = LayersConfig(PATTERN, MIXERS)
    model = Decoder(config, layers, vocabulary=VOCABULARY, memory=MemoryConfig(recompute=recompute))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                parameter.sub_(3.0)  # slow decays: what the meta tokens leave is there at the end
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def text() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and labels [1, T], and the gradient of the losses."""
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(VOCABULARY, (2, 1, LENGTH), generator=generator)
    return tokens, labels, torch.randn(1, LENGTH, generator=generator, dtype=torch.float64)


def reference(model: Decoder, tokens: Tensor, labels: Tensor) -> Tensor:
    """The losses of one document: the meta tokens are simply its first tokens."""
    assert model.meta_embedding is not None
    meta = len(model.meta_embedding)
    x, keys = torch.cat((model.meta_embedding, model.embedding.weight[tokens])), None
    for block in model.blocks:
        block_: Any = block
        inputs = torch.stack([normed(row, block_.mixer_norm.weight) for row in x])
        y, keys = layer(block_.mixer, inputs, keys, meta=meta)
        x = x + y
        inputs = torch.stack([normed(row, block_.mlp_norm.weight) for row in x])
        gate, up = (inputs @ block_.mlp.gate_up.weight.T).chunk(2, dim=1)
        x = x + (silu(gate) * up) @ block_.mlp.down.weight.T
    logits = torch.stack([normed(row, model.norm.weight) for row in x[meta:]]) @ model.head.weight.T
    return logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]


@functools.cache
def truth(meta: int) -> dict[str, Tensor]:
    return looped(model_of(meta))


def looped(model: Decoder) -> dict[str, Tensor]:
    """Losses of the loop over each document's tokens, and their gradients."""
    tokens, labels, gradient = text()
    bounds = [(a, b) for a, b in zip(BOUNDS[:-1], BOUNDS[1:], strict=True) if b > a]
    losses = torch.cat([reference(model, tokens[0, a:b], labels[0, a:b]) for a, b in bounds])[None]
    losses.backward(gradient.to(losses.dtype))
    return {"losses": losses.detach()} | {name: _gradient(p) for name, p in model.named_parameters()}


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def found(meta: int, shard: SequenceShard, **options: Any) -> dict[str, Tensor]:
    """Losses of this rank's tokens, and its part of the gradients."""
    model = model_of(meta, **options)
    tokens, labels, gradient = (shard.split(x, dim=1) for x in text())
    losses = model(tokens, shard, labels)
    assert isinstance(losses, Tensor)
    losses.backward(gradient.to(losses.dtype))
    return {"losses": losses.detach()} | {name: _gradient(p) for name, p in model.named_parameters()}


def spread(rank: int, world: int, meta: int, wanted: dict[str, Tensor]) -> None:
    import torch.distributed as dist

    for layout in ("contiguous", "zigzag", "striped"):
        shard = SequenceShard(LENGTH, world_group(), layout, BOUNDS)
        here = found(meta, shard)
        losses = shard.gather(here.pop("losses"), dim=1)
        for gradient in here.values():
            dist.all_reduce(gradient)
        errors = {name: relative(x, wanted[name]) for name, x in {"losses": losses, **here}.items()}
        assert max(errors.values()) < 1e-10, (layout, errors)


@pytest.mark.parametrize("meta", META)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_a_model_is_the_papers_loop_on_any_number_of_ranks(world: int, meta: int) -> None:
    run_distributed(world, spread, meta, truth(meta))


def test_float32_loses_what_the_reference_loses() -> None:
    single = torch.float32
    exact = looped(model_of(5, dtype=single).double())
    loop, model = looped(model_of(5, dtype=single)), found(5, SequenceShard(LENGTH, cu_seqlens=BOUNDS), dtype=single)
    for name, wanted in exact.items():
        # 1e-6: where the loop happens to lose less than a rounding or two.
        assert relative(model[name].double(), wanted) < 4 * relative(loop[name].double(), wanted) + 1e-6, name


def policies(rank: int, world: int) -> None:
    shard = SequenceShard(LENGTH, world_group(), "zigzag", BOUNDS)
    wanted = found(5, shard, dtype=torch.float32)
    mixed = {"wide": "attention", "near": "full", "default": "none"}  # who hands on runs again, who takes does not
    for policy in ("full", "attention", ["linear_attention", "aten::mm"], mixed):
        again = found(5, shard, dtype=torch.float32, recompute=policy)
        assert all(torch.equal(again[name], x) for name, x in wanted.items()), policy


@pytest.mark.parametrize("world", [1, 3])
def test_every_policy_has_the_same_gradients(world: int) -> None:
    run_distributed(world, policies)


@torch.no_grad()
def test_generation_is_the_parallel_form() -> None:
    model, (tokens, _, _) = model_of(5), text()
    assert model.state_kind == "growing"
    logits = model(tokens, SequenceShard(LENGTH))
    for pieces in ((1,), (20,), (9, 1, 12)):
        states, read = None, 0
        for piece in pieces:
            last, states = model.prefill(tokens[:, read : read + piece], states)
            read += piece
            assert relative(last, logits[:, read - 1]) < 1e-12
        assert states is not None
        for token in range(read, LENGTH):
            last, states = model.step(tokens[:, token], states)
            assert relative(last, logits[:, token]) < 1e-12


def test_layers_that_share_keep_no_keys_and_project_none() -> None:
    place = LayerPlace(width=32, index=1, depth=3, meta=5)
    options = {name: value for name, value in NEAR.items() if name != "mixer"}
    own, shared = HymbaConfig(**options), HymbaConfig(**options, share_kv=True)
    projected = 32 * 2 * (8 + 16)  # two heads of keys and of values, twice as wide
    assert HymbaMixer.count_parameters(own, place) - HymbaMixer.count_parameters(shared, place) == projected
    assert cache_bytes(own, place, 40) == 2 * (5 + 6) * 2 * (8 + 16) and cache_bytes(shared, place, 40) == 0
    mixer = HymbaMixer(shared, place)
    with pytest.raises(ValueError, match="shared: got nothing, a layer with share_kv needs"):
        mixer(torch.zeros(1, 6, 32), SequenceShard(length=1))


def cache_bytes(config: HymbaConfig, place: LayerPlace, tokens: int) -> int:
    """Bytes of the bfloat16 keys and values that a layer keeps of a text of so many tokens."""
    with torch.device("meta"):
        state, cache = HymbaMixer(config, place).empty_state(1, "meta", torch.bfloat16), None
    if not config.share_kv:
        made = (x.new_empty(1, tokens, *x.shape[2:]) for x in state.cache[:2])
        cache = state.cache.extended(*made, ring=config.window is not None)
    kept = (state.meta_keys, state.meta_values, *(() if cache is None else cache[:2]))
    return sum(x.numel() * x.element_size() for x in kept)


def test_the_published_models_cache_is_as_much_smaller() -> None:
    # Hymba-1.5B: 32 layers of width 1600, three of them without a window, the others in groups of two and one of three.
    near: dict[str, Any] = {"mixer": "hymba", "heads": 25, "kv_heads": 5, "ssm_heads": 50}
    mixers = {"wide": {**near, "window": None}, "near": near, "reader": {**near, "share_kv": True}}
    readers = [*range(2, 15, 2), 17, 18, *range(20, 31, 2)]
    layers = LayersConfig({"wide": [0, 15, 31], "reader": readers, "default": "near"}, mixers)
    planned = named_layers(layers, width=1600, depth=32, meta=128)
    ours = sum(cache_bytes(layer.options, layer.place, 8000) for layer in planned)
    other = 28 * 8 * (128 + 128) * 2 * 8000  # Llama-3.2-3B, whose cache is 918 MB in the paper
    assert ours == (3 * (8000 + 128) + 14 * (1024 + 128)) * 5 * (64 + 128) * 2
    assert other / ours == pytest.approx(11.67, rel=0.015)
    weights = sum(HymbaMixer.count_parameters(layer.options, layer.place) for layer in planned)
    weights += 32 * (3 * 1600 * 5504 + 2 * 1600) + (32001 + 128 + 1) * 1600
    assert weights == pytest.approx(1.52e9, rel=0.02)


@pytest.mark.parametrize(
    ("pattern", "changed", "said"),
    [
        (["reader"], {}, r"reader.share_kv: got true in the first layer, .* \(layer 0\)"),
        (
            ["wide", "reader"],
            {},
            r"reader.window: got 5 with share_kv, .* of the layer before: its null would work .layer 1",
        ),
        (["near", "reader"], {"kv_heads": 4}, r"reader.kv_heads: got 4 with share_kv, .* before: its 2 would work"),
        (["softmax", "reader"], {}, r"reader.share_kv: got true behind a softmax layer, expected a hymba layer"),
        (["near", "softmax"], {}, r"model.meta_tokens: got 3, which softmax cannot have .*; hymba can, and 0 works"),
        (["near"], {"window": -1}, r"reader.window: got -1, it must be 0 or more"),
        (
            ["near"],
            {"ssm_heads": 5},
            r"reader.ssm_heads: got 5, it must divide expand \* model.width = 64: 4 or 8 would",
        ),
        (["near"], {"expand": 0}, r"reader.expand: got 0, it must be at least 1"),
        (["near"], {"head_width": 3}, r"reader.head_width: got 3, rotary positions need an even number"),
        (["near"], {"scan_strategy": "ring"}, r"reader.scan_strategy: got 'ring', expected one of auto, allgather"),
        (["near"], {"strategy": "chain"}, r"reader.strategy: got 'chain', expected one of auto, ring"),
        (["near"], {"rope_base": 1.0}, r"reader.rope_base: got 1.0, it must be above 1"),
    ],
)
def test_what_cannot_work_is_refused(pattern: list[str], changed: dict[str, Any], said: str) -> None:
    mixers = MIXERS | {"reader": MIXERS["reader"] | changed}
    with pytest.raises(ValueError, match=said):
        named_layers(LayersConfig(pattern, mixers), width=32, depth=len(pattern), meta=3)


def test_ways_over_ranks_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^scan_strategy: got 'ulysses' with 4 heads over 3 ranks"):
        HymbaMixer.check_ranks(HymbaConfig(heads=4, scan_strategy="ulysses"), strategy="auto", ranks=3, rows=1)
    with pytest.raises(ValueError, match=r"^strategy: got 'ulysses'"):
        HymbaMixer.check_ranks(HymbaConfig(heads=4), strategy="ulysses", ranks=3, rows=1)


def test_states_are_tensors_and_numbers() -> None:
    state = HymbaMixer(HymbaConfig(heads=4), LayerPlace(32, 0, 1)).empty_state(1, "cpu", torch.float32)
    assert all(isinstance(leaf, Tensor | int) for leaf in tree_leaves(state))
