"""What holds for every mixer, found by itself: the paper's numbers, on any number of ranks, and token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from longtrain.layers import MIXERS, LayerPlace, Mixer
from longtrain.layers.mixers.base import StatefulMixer
from longtrain.parallel import SequenceShard, count_messages
from tests.distributed import run_distributed
from tests.layers.mixer_cases import CASES, CU_SEQLENS, LENGTH, PLACE, build, companion, inputs, relative, truth

every_case = pytest.mark.parametrize(("name", "number"), CASES)
SPREADS = {
    1: ("contiguous", "zigzag"),
    2: ("contiguous", "zigzag", "striped"),
    3: ("contiguous", "zigzag"),
    4: ("contiguous", "zigzag", "striped:4"),
}
STRATEGIES = {1: "auto", 2: "allgather", 3: "alltoall", 4: "chain"}
"""How states cross ranks; all ways are compared with one device elsewhere, here mixers are seen to pass them on."""


@pytest.mark.parametrize("name", MIXERS)
def test_has_a_reference(name: str) -> None:
    module = companion(name)
    wanted = f"tests/layers/references/{name}.py, described at the head of tests/layers/mixer_cases.py"
    assert module is not None, f"mixer {name!r} has no {wanted}"
    assert module.CASES and callable(module.reference), f"{wanted}: CASES and reference"


def spread(rank: int, world: int, name: str, number: int, layout: str) -> list[Tensor]:
    """Output and gradients of input and weights, whole, from a mixer on a spread sequence."""
    import torch.distributed as dist

    mixer = build(name, number)
    if isinstance(mixer, StatefulMixer):
        mixer.strategy = STRATEGIES[world]
    x, dy = inputs()
    shard = SequenceShard(length=LENGTH, group=dist.group.WORLD, layout=layout, cu_seqlens=CU_SEQLENS)
    local = shard.split(x, dim=1).requires_grad_()
    y = mixer(local, shard)
    gradients = torch.autograd.grad(y, [local, *mixer.parameters()], shard.split(dy, dim=1))
    for gradient in gradients[1:]:
        dist.all_reduce(gradient)
    return [shard.gather(y.detach(), dim=1), shard.gather(gradients[0], dim=1), *gradients[1:]]


@every_case
@pytest.mark.parametrize("world", SPREADS)
def test_is_the_papers_loop_on_any_number_of_ranks(name: str, number: int, world: int) -> None:
    wanted = truth(name, number)
    for layout in SPREADS[world]:
        for found in run_distributed(world, spread, name, number, layout):
            errors = [relative(a, b) for a, b in zip(found, wanted, strict=True)]
            assert max(errors) < 1e-10, (layout, errors)


def exchanges(rank: int, world: int, name: str) -> int:
    """All-to-alls of one forward pass whose scan is to use them."""
    import torch.distributed as dist

    mixer = build(name, 0)
    assert isinstance(mixer, StatefulMixer)
    mixer.strategy = "alltoall"
    x, _ = inputs()
    shard = SequenceShard(length=LENGTH, group=dist.group.WORLD)
    with count_messages() as counter, torch.no_grad():
        mixer(shard.split(x, dim=1), shard)
    return counter.count("all_to_all")


@pytest.mark.parametrize("name", [name for name, mixer in MIXERS.items() if issubclass(mixer, StatefulMixer)])
def test_the_strategy_reaches_the_scan(name: str) -> None:
    assert min(run_distributed(2, exchanges, name)) > 0


@every_case
def test_float32_loses_what_the_reference_loses(name: str, number: int) -> None:
    module = companion(name)
    assert module is not None
    x, dy = inputs(dtype=torch.float32)
    results = {}
    for kind, dtype in (("layer", torch.float32), ("loop", torch.float32), ("exact", torch.float64)):
        mixer, seen = build(name, number, dtype=torch.float32).to(dtype), x.to(dtype).requires_grad_()
        y = mixer(seen, SequenceShard(length=LENGTH)) if kind == "layer" else module.reference(mixer, seen[0])[None]
        results[kind] = [y.detach(), *torch.autograd.grad(y, [seen, *mixer.parameters()], dy.to(dtype))]
    for layer, loop, exact in zip(*results.values(), strict=True):
        # 1e-6: where the loop happens to lose less than a rounding or two.
        assert relative(layer.double(), exact) < 4 * relative(loop.double(), exact) + 1e-6


@every_case
def test_half_precision_loses_its_own_digits_only(name: str, number: int) -> None:
    mixer = build(name, number, dtype=torch.float32)
    x, dy = inputs(dtype=torch.float32)
    shard = SequenceShard(length=LENGTH)
    wanted = mixer(x, shard).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = mixer(x, shard)
        assert relative(found.detach().float(), wanted) < 0.03  # bfloat16 rounds by up to 0.004, here a few times over
        found.backward(dy.to(found.dtype))
        if mixer.state_kind == "none":
            return
        with torch.no_grad():
            _, state = mixer.prefill(x[:, :20], SequenceShard(length=20))
            steps = []
            for t in range(20, LENGTH):
                y, state = mixer.step(x[:, t], state)
                steps.append(y)
    assert relative(torch.stack(steps, 1).float(), wanted[:, 20:]) < 0.03
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in mixer.parameters())


@every_case
def test_nothing_comes_from_later_tokens(name: str, number: int) -> None:
    mixer = build(name, number)
    x, noise = inputs()
    changed = x.clone()
    changed[:, 20:] = noise[:, 20:]
    shard = SequenceShard(length=LENGTH)
    before, after = mixer(x, shard), mixer(changed, shard)
    # Not to the bit: how many tokens pick a block changes the shapes of products, and so their rounding.
    assert relative(after[:, :20], before[:, :20]) < 1e-14
    assert not torch.isclose(before[:, 20:], after[:, 20:]).all()


@every_case
@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_no_earlier_token(name: str, number: int, value: float) -> None:
    mixer = build(name, number)
    x, _ = inputs()
    x[0, 20] = value
    y = mixer(x, SequenceShard(length=LENGTH))
    assert y[0, :20].isfinite().all() and y[1:].isfinite().all()
    assert not y[0, 20].isfinite().all()


@every_case
@torch.no_grad()
def test_what_happened_long_ago_matters(name: str, number: int) -> None:
    mixer = build(name, number)
    if not isinstance(mixer, StatefulMixer):
        return
    x, noise = inputs()
    changed = torch.cat((noise[:, :5], x[:, 5:]), 1)
    shard = SequenceShard(length=LENGTH)
    # Otherwise a state that is lost on its way from rank to rank would change no test.
    assert relative(mixer(changed, shard)[:, -5:], mixer(x, shard)[:, -5:]) > 1e-4


@every_case
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@torch.no_grad()
def test_steps_are_the_parallel_form(name: str, number: int, dtype: torch.dtype, allowed: float) -> None:
    mixer = build(name, number, dtype=dtype)
    if mixer.state_kind == "none":
        with pytest.raises(NotImplementedError, match=name):
            mixer.empty_state(1, "cpu", dtype)
        return
    x, _ = inputs(batch=2, dtype=dtype)
    wanted = mixer(x, SequenceShard(length=LENGTH))
    # From nothing; after one prompt; after a prompt in pieces, one of a single token and one of none.
    for pieces in ((), (20,), (9, 1, 0, 14)):
        state, outputs = mixer.empty_state(2, "cpu", dtype), []
        for number_, piece in enumerate(pieces):
            start = sum(pieces[:number_])
            before = None if number_ == 0 else state
            y, state = mixer.prefill(x[:, start : start + piece], SequenceShard(length=piece), before)
            outputs.append(y)
        for t in range(sum(pieces), LENGTH):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y[:, None])
        found = torch.cat(outputs, 1)
        assert relative(found, wanted) < allowed, pieces
        assert float((found - wanted).abs().max()) < 10 * allowed * float(wanted.abs().max())


@every_case
@torch.no_grad()
def test_states_stay_small(name: str, number: int) -> None:
    mixer = build(name, number)
    if mixer.state_kind == "none":
        return
    x, _ = inputs()
    _, state = mixer.prefill(x, SequenceShard(length=LENGTH))
    assert isinstance(state, tuple) and hasattr(state, "_fields")
    assert all(isinstance(leaf, Tensor | int) for leaf in tree_leaves(state))
    before = size(state)
    for _ in range(4):
        for t in range(LENGTH):
            _, state = mixer.step(x[:, t], state)
    if mixer.state_kind == "constant":
        assert size(state) == before == size(mixer.empty_state(1, "cpu", torch.float64))
    else:
        assert size(state) > before


def size(state: Any) -> int:
    return sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


@every_case
def test_prefill_takes_one_document_on_one_device(name: str, number: int) -> None:
    mixer = build(name, number)
    if mixer.state_kind == "none":
        return
    x, _ = inputs()
    for shard in (
        SequenceShard(length=LENGTH, cu_seqlens=[0, 9, LENGTH]),
        SequenceShard.pretend(LENGTH, rank=0, world=2),
    ):
        with pytest.raises(ValueError, match=r"shard: got \d documents? over \d ranks?"):
            mixer.prefill(x, shard)


@every_case
def test_saved_and_loaded_it_is_the_same(name: str, number: int, tmp_path: Any) -> None:
    mixer = build(name, number)
    torch.save(mixer.state_dict(), tmp_path / "weights")
    torch.manual_seed(9)
    other = MIXERS[name](config_of(name, number), PLACE).double()
    other.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    x, _ = inputs()
    shard = SequenceShard(length=LENGTH)
    assert torch.equal(mixer(x, shard), other(x, shard))


def config_of(name: str, number: int) -> Any:
    from tests.layers.mixer_cases import options_of

    return MIXERS[name].Config(**options_of(name)[number])


@every_case
def test_weights_and_operations_are_counted(name: str, number: int) -> None:
    config, mixer = config_of(name, number), build(name, number)
    kind = type(mixer)
    weights = list(mixer.parameters())
    assert kind.count_parameters(config, PLACE) == sum(weight.numel() for weight in weights)
    mixing = kind.mixing_flops(config, PLACE, CU_SEQLENS)
    assert mixing > 0 or kind.mixing_flops.__func__ is Mixer.mixing_flops.__func__  # it says nothing about itself
    projections = sum(2 * weight.numel() for weight in weights if weight.ndim > 1)
    assert kind.flops_per_token(config, PLACE, CU_SEQLENS) == projections + mixing
    if isinstance(mixer, StatefulMixer):
        assert kind.mixing_flops(config, PLACE, [0, 1_000_000]) == mixing
        # Every number of a matrix state is at least added to and read, a multiply-add each.
        state = mixer.empty_state(1, "meta", torch.float32)
        assert mixing >= 4 * sum(x.numel() for x in tree_leaves(state) if isinstance(x, Tensor) and x.ndim == 4)


@pytest.mark.parametrize("name", MIXERS)
def test_heads_that_do_not_divide_are_refused(name: str) -> None:
    kind = MIXERS[name]
    if "heads" not in kind.Config.__dataclass_fields__:
        return
    kind.check(kind.Config(heads=4), PLACE)
    for heads in (0, 5):
        with pytest.raises(ValueError, match=rf"heads: got {heads}"):
            kind.check(kind.Config(heads=heads), LayerPlace(width=32, index=0, depth=1))


def test_a_mixer_without_steps_says_so() -> None:
    class Plain(Mixer):
        name = "plain"

        @classmethod
        def check(cls, config: Any, place: LayerPlace) -> None: ...

        def __init__(self) -> None:
            super().__init__(None, PLACE)

        def forward(self, x: Tensor, shard: SequenceShard) -> Tensor:
            return x

    mixer, x = Plain(), torch.zeros(1, 3, 32)
    assert mixer.state_kind == "none"
    for call in (
        lambda: mixer.empty_state(1, "cpu", torch.float32),
        lambda: mixer.prefill(x, SequenceShard(length=3)),
        lambda: mixer.step(x[:, 0], None),
    ):
        with pytest.raises(NotImplementedError, match="plain keeps no state: its text is run again"):
            call()
