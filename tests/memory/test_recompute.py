"""Recompute policies: the same gradients bit for bit, and the messages that each costs."""

from typing import Any

import pytest
import torch

from longtrain.errors import UsageError
from longtrain.layers.mixers import MIXERS
from longtrain.layers.mixers.base import StatefulMixer
from longtrain.memory import MemoryConfig, layer_policies, run_block
from longtrain.memory.offload import Store
from longtrain.memory.operators import DISTRIBUTED
from longtrain.parallel import SequenceShard, sequence_parallel_linear_attention
from tests.cover import cover, pytest_generate_tests  # noqa: F401 (pytest finds the hook by its name)
from tests.distributed import run_distributed
from tests.memory.models import BOUNDS, Recorded, model_of, passes, with_policy
from tests.parallel.comparing import world_group

# Those that run no ring, whose backward goes on from what forward held last, which recompute does not keep.
RECURRENT = tuple(name for name, mixer in MIXERS.items() if issubclass(mixer, StatefulMixer)) + ("mega", "moba", "rat")
OTHERS: tuple[Any, ...] = (
    list(DISTRIBUTED),
    ["attention", "aten::mm"],
    {"softmax": "attention", "gla": "full", "gated_deltanet": ["delta_rule"], "default": "none"},
)


def _check_policies(rank: int, world: int, layout: str, softmax: dict[str, Any], other: Any) -> None:
    shard = SequenceShard(BOUNDS[-1], world_group() if world > 1 else None, layout, BOUNDS)
    options = {"softmax": {"heads": 4, "kv_heads": 2, **softmax}}
    expected, (forward, plain) = passes(model_of(MemoryConfig(), options=options), shard)
    handshakes = ("all_gather", 32 * (world - 1))
    traffic = []
    for policy in ("full", "attention", other):
        found, (again, backward) = passes(model_of(with_policy(policy), options=options), shard)
        assert found.keys() == expected.keys()
        for name, truth in expected.items():
            assert torch.equal(found[name], truth), (policy, name)
        assert again == forward, policy
        traffic.append(backward)
    full, attention, _ = traffic
    # One more forward, to the byte; and of it nothing, not even the ranks' handshakes.
    assert full == attention + forward
    assert attention[handshakes] == plain[handshakes] == 0
    assert other != list(DISTRIBUTED) or traffic[2] == attention


@cover(
    {
        "world": [1, 2, 3, 4],
        "layout": ["zigzag", "striped"],
        "softmax": [{"qk_norm": True, "sinks": True}, {"layout": "balanced"}, {"strategy": "allgather"}],
        "other": OTHERS,
    }
)
def test_every_policy_has_the_same_gradients_and_attention_repeats_no_message(case: dict[str, Any]) -> None:
    run_distributed(case["world"], _check_policies, case["layout"], case["softmax"], case["other"], timeout=120)


def _check_recurrent(rank: int, world: int) -> None:
    shard = SequenceShard(BOUNDS[-1], world_group(), "zigzag", BOUNDS)
    _, (_, plain) = passes(model_of(MemoryConfig(), pattern=RECURRENT), shard)
    _, (_, kept) = passes(model_of(with_policy("attention"), pattern=RECURRENT), shard)
    assert plain == kept != {}


def test_backward_of_recurrent_mixers_sends_the_same_with_all_kept_and_with_attention() -> None:
    run_distributed(2, _check_recurrent)


def test_what_is_kept_is_given_back_once() -> None:
    model, shard = model_of(with_policy("attention"), pattern=("softmax",)), SequenceShard(5)
    tokens = torch.arange(5)[None]
    losses = model(tokens, shard, tokens)
    assert isinstance(losses, torch.Tensor)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        losses.sum().backward()


def test_what_a_block_hands_on_holds_nothing_else() -> None:
    def block(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = x.sin() * 2
        return whole.sum(-1), whole[:, :2], whole[:, 2:3].exp()

    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    results = run_block(block, x, policy=layer_policies("full", ["softmax"])[0])
    assert [z.untyped_storage().nbytes() for z in results] == [8 * z.numel() for z in results] == [40, 80, 40]
    dy = [torch.randn_like(z) for z in results]
    assert torch.equal(*(torch.autograd.grad(made, x, dy)[0] for made in (results, block(x))))


def test_without_gradients_nothing_is_recorded() -> None:
    model, shard = model_of(with_policy("attention"), pattern=("softmax", "gla")), SequenceShard(5)
    tokens = torch.arange(5)[None]
    plain = model_of(MemoryConfig(), pattern=("softmax", "gla"))
    with torch.no_grad():
        assert torch.equal(model(tokens, shard), plain(tokens, shard))  # type: ignore[arg-type]


class _Overwriting(torch.nn.Module):
    """A block that writes to what is kept: to a scan's output, and to a product through a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(8, 24, bias=False)

    def forward(self, x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (6, 4)).split(2, dim=2)
        y, _ = sequence_parallel_linear_attention(q, k, v, None, shard, scale=1.0)
        y.mul_(v.sigmoid())
        product = torch.mm(y.flatten(0, 1).flatten(1), self.qkv.weight[:8])
        product[:, 2:5] += 3.0
        return x + product.cos()


@pytest.mark.parametrize("stored", [False, True])
def test_what_a_block_writes_to_is_kept_as_it_was(stored: bool) -> None:
    block, shard, found = _Overwriting(), SequenceShard(9), []
    x, dy = torch.randn(1, 9, 8), torch.randn(1, 9, 8)
    for kept in (None, ["aten::mm", "linear_attention"]):
        policy = layer_policies("none" if kept is None else kept, ["lightning"])[0]
        copies = Recorded()
        store = Store(copies, in_flight=1, kept=True) if stored else None
        y = run_block(block, x, shard, policy=policy, store=store)
        if stored and kept:
            # The copies are made before what they are made of changes.
            assert [event for event, _ in copies.events].count("wait out") >= 2
        found.append((y, *torch.autograd.grad(y, list(block.parameters()), dy)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_operators_of_torch_whose_results_are_written_to_can_be_kept() -> None:
    """`rms_norm` as torch decomposes it adds eps to a mean in place."""
    shard = SequenceShard(BOUNDS[-1], cu_seqlens=BOUNDS)
    truth, _ = passes(model_of(MemoryConfig(), pattern=("mamba2",)), shard)
    found, _ = passes(model_of(with_policy(["aten::mean"]), pattern=("mamba2",)), shard)
    assert all(torch.equal(found[name], wanted) for name, wanted in truth.items())


def test_operators_that_no_layer_runs_are_refused() -> None:
    shard = SequenceShard(5)
    passes(model_of(with_policy(["attention", "linear_attention"]), pattern=("softmax", "gla")), shard)
    with pytest.raises(
        UsageError, match=r"memory.recompute: got delta_rule, .* runs; without it \(attention\) it would"
    ):
        passes(model_of(with_policy(["attention", "delta_rule"]), pattern=("softmax", "gla")), shard)
    with pytest.raises(UsageError, match=r"memory.recompute.gla: got attention, .* runs; full keeps none too"):
        passes(model_of(with_policy({"softmax": "full", "gla": ["attention"]}), pattern=("softmax", "gla")), shard)
