"""Every mixer in the folder, found by itself: the same numbers on any number of ranks, and no look into the future."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from longtrain.layers import MIXERS, LayerPlace, SequenceParallelAttention, SwiGLU, rotate
from longtrain.layers.mixers.lightning import head_log_decays
from longtrain.layers.pattern import LayersConfig, plan_layers
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from tests.distributed import run_distributed

PLACE = LayerPlace(width=32, index=1, depth=3)
LENGTH = 43
CU_SEQLENS = [0, 1, 9, 9, 30, 43]


def build(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    mixer = MIXERS[name]
    return mixer(mixer.Config(heads=4), PLACE).double()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(1, LENGTH, PLACE.width, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def spread(rank: int, world: int, name: str, layout: str) -> list[Tensor]:
    """Output and gradients of input and weights, whole, from a mixer on a spread sequence."""
    import torch.distributed as dist

    mixer = build(name)
    x, dy = inputs()
    shard = SequenceShard(length=LENGTH, group=dist.group.WORLD, layout=layout, cu_seqlens=CU_SEQLENS)
    local = shard.split(x, dim=1).requires_grad_()
    y = mixer(local, shard)
    y.backward(shard.split(dy, dim=1))
    assert local.grad is not None
    gradients = []
    for parameter in mixer.parameters():
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        gradients.append(parameter.grad)
    return [shard.gather(y.detach(), dim=1), shard.gather(local.grad, dim=1), *gradients]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    ("world", "layout"), [(2, "contiguous"), (2, "striped"), (3, "zigzag"), (4, "striped:4"), (4, "contiguous")]
)
def test_same_numbers_on_any_number_of_ranks(name: str, world: int, layout: str) -> None:
    mixer = build(name)
    x, dy = inputs()
    x.requires_grad_()
    # The oracle: every document alone.
    y = torch.cat([mixer(part, SequenceShard(length=part.shape[1])) for part in documents(x)], dim=1)
    y.backward(dy)
    assert x.grad is not None
    wanted = [y.detach(), x.grad, *(p.grad for p in mixer.parameters())]
    for found in run_distributed(world, spread, name, layout):
        assert [relative(a, b) < 1e-10 for a, b in zip(found, wanted, strict=True)] == [True] * len(wanted)  # type: ignore[arg-type]


def documents(x: Tensor) -> list[Tensor]:
    return [x[:, a:b] for a, b in zip(CU_SEQLENS[:-1], CU_SEQLENS[1:], strict=True) if b > a]


@pytest.mark.parametrize("name", MIXERS)
def test_nothing_comes_from_later_tokens(name: str) -> None:
    mixer = build(name)
    x, noise = inputs()
    changed = x.clone()
    changed[:, 20:] = noise[:, 20:]
    shard = SequenceShard(length=LENGTH)
    before, after = mixer(x, shard), mixer(changed, shard)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all()


def test_softmax_is_attention_with_rotated_grouped_heads() -> None:
    torch.manual_seed(3)
    mixer = MIXERS["softmax"](MIXERS["softmax"].Config(heads=4, kv_heads=2, window=5), PLACE).double()
    x, _ = inputs()
    shard = SequenceShard(length=LENGTH)
    q, k, v = (mixer.qkv.weight @ x[0].T).T.split((32, 16, 16), dim=1)  # type: ignore[union-attr, operator]
    wanted = torch.zeros(LENGTH, 32, dtype=torch.float64)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        shared = slice(8 * (head // 2), 8 * (head // 2) + 8)
        for i in range(LENGTH):
            seen = range(max(0, i - 5), i + 1)
            scores = torch.stack([turned(q[i, rows], i) @ turned(k[j, shared], j) for j in seen]) / math.sqrt(8)
            wanted[i, rows] = scores.softmax(0) @ v[list(seen)][:, shared]
    torch.testing.assert_close(mixer(x, shard)[0], wanted @ mixer.out.weight.T, rtol=0, atol=1e-12)  # type: ignore[union-attr, operator]


def turned(x: Tensor, position: int) -> Tensor:
    """Each pair (i, i + K/2) as a complex number times e^(i angle): RoFormer, equation 34."""
    half = len(x) // 2
    angles = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag))


def test_rotation_depends_on_distance_only_and_starts_anew_in_each_document() -> None:
    q, k = torch.randn(2, 1, 2, 3, 8, dtype=torch.float64)
    near, far = (rotate(q, torch.tensor([5, 9]) + far) for far in (0, 1_000_000))
    near_k, far_k = (rotate(k, torch.tensor([2, 3]) + far) for far in (0, 1_000_000))
    torch.testing.assert_close((near * near_k).sum(-1), (far * far_k).sum(-1), rtol=1e-8, atol=1e-8)
    shard = SequenceShard(length=6, cu_seqlens=[0, 4, 6])
    assert shard.document_positions.tolist() == [0, 1, 2, 3, 0, 1]


def test_lightning_is_the_papers_recurrence() -> None:
    torch.manual_seed(4)
    mixer = MIXERS["lightning"](MIXERS["lightning"].Config(heads=4), PLACE).double()
    x, _ = inputs()
    q, k, v, gate = (x[0] @ mixer.qkvg.weight.T).chunk(4, dim=1)  # type: ignore[union-attr, operator]
    q, k = F.silu(q), F.silu(k)
    # Slopes 2^-2, 2^-4, 2^-6, 2^-8 for 4 heads, two thirds of them in the second of three layers.
    decay = torch.exp(-torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64) * (2 / 3))
    wanted = torch.zeros(LENGTH, 32, dtype=torch.float64)
    for head in range(4):
        part, state = slice(8 * head, 8 * head + 8), torch.zeros(8, 8, dtype=torch.float64)
        for t in range(LENGTH):
            state = decay[head] * state + torch.outer(k[t, part], v[t, part])
            wanted[t, part] = 8**-0.5 * q[t, part] @ state
    by_head = wanted.unflatten(1, (4, 8))
    wanted = (by_head / (by_head.square().mean(2, keepdim=True) + 1e-6).sqrt()).flatten(1) * torch.sigmoid(gate)
    found = mixer(x, SequenceShard(length=LENGTH))[0]
    torch.testing.assert_close(found, wanted @ mixer.out.weight.T, rtol=0, atol=1e-8)  # type: ignore[union-attr, operator]


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
    ],
)
def test_bad_layers_are_refused_by_key(config: dict, parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as refusal:
        plan_layers(LayersConfig(**config), width=32, depth=2)
    assert all(part in str(refusal.value) for part in parts)
