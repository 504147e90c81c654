"""Linear mixers as registered steps: what recompute repeats, and what compiled and fake-tensor runs see."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longtrain.parallel import (
    SequenceShard,
    sequence_parallel_delta_rule,
    sequence_parallel_linear_attention,
    sequence_parallel_slot_attention,
)
from longtrain.parallel.communication import count_messages
from longtrain.parallel.linear.operators import PAIRS
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group
from tests.parallel.linear_cases import STRATEGIES

MIXERS = ("linear_attention", "delta_rule", "slot_attention")
KEPT = [getattr(torch.ops.longtrain, f"sequence_parallel_{mixer}").default for mixer in MIXERS]
WIDTHS = (8, 8, 24, 6, 18, 18)  # q and k of 2 heads; v, beta, slot and decay of 6 heads


def _layer(x: Tensor, weight: Tensor, shard: SequenceShard, mixer: str, strategy: str) -> Tensor:
    """A projection, a mixer of 6 heads over 2 of q and k, and something after it that wants result and state."""
    q, k, v, beta, slot, decay = (x @ weight).split(WIDTHS, dim=-1)
    q, k, v = q.unflatten(-1, (2, 4)), F.normalize(k.unflatten(-1, (2, 4)), dim=-1), v.unflatten(-1, (6, 4))
    slot, decay = slot.unflatten(-1, (6, 3)), -0.1 * F.softplus(decay.unflatten(-1, (6, 3)))
    if mixer == "slot_attention":
        out, states = sequence_parallel_slot_attention(
            q, k, v, slot, decay, shard, strategy=strategy, return_state=True
        )
        state = None if states is None else states[1]
    elif mixer == "delta_rule":
        out, state = sequence_parallel_delta_rule(
            q, k, v, beta.sigmoid(), decay[..., 0], shard, strategy=strategy, return_state=True
        )
    else:
        out, state = sequence_parallel_linear_attention(
            q, k, v, decay[..., 0], shard, strategy=strategy, return_state=True
        )
    assert state is not None
    return x + (out * state.square().mean().sigmoid()).flatten(2)


def _run(policy: str, shard: SequenceShard, mixer: str, strategy: str) -> tuple[list[Tensor], dict[str, list[int]]]:
    """Results and gradients of two layers, and the bytes of the messages of forward and of backward."""
    seeded = torch.Generator().manual_seed(5)
    whole = torch.randn(1, shard.length, 24, generator=seeded)
    weights = [torch.randn(24, sum(WIDTHS), generator=seeded).div(5).requires_grad_() for _ in range(2)]
    x = shard.split(whole, dim=1).requires_grad_()
    y = x
    with count_messages() as forward:
        for weight in weights:
            layer = partial(_layer, shard=shard, mixer=mixer, strategy=strategy)
            if policy == "none":
                y = layer(y, weight)
            elif policy == "full":
                y = checkpoint(layer, y, weight, use_reentrant=False)
            else:
                contexts = partial(create_selective_checkpoint_contexts, KEPT)
                y = checkpoint(layer, y, weight, use_reentrant=False, context_fn=contexts)
    with count_messages() as backward:
        y.square().sum().backward()
    gradients = [leaf.grad for leaf in (x, *weights)]
    traffic = {}
    for name, counter in (("forward", forward), ("backward", backward)):
        # The handshake is a gather of 32 bytes from each rank.
        sent = [message.sent_bytes for message in counter.messages if message.sent_bytes != 32 * (shard.world - 1)]
        traffic[name] = sorted(sent)
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)], traffic


def _check_policies(rank: int, world: int, mixer: str) -> None:
    shard = SequenceShard(29, world_group(), "zigzag", [0, 10, 29])
    for strategy in STRATEGIES:
        expected, plain = _run("none", shard, mixer, strategy)
        kept, keeping = _run("keep", shard, mixer, strategy)
        full, recomputing = _run("full", shard, mixer, strategy)
        assert len(expected) == 4
        for results in (kept, full):
            for result, truth in zip(results, expected, strict=True):
                assert torch.equal(result, truth), strategy  # the same steps in the same order
        assert plain["forward"] == keeping["forward"] == recomputing["forward"] != []
        # Kept: backward's own messages and nothing of forward's. Recomputed: one more forward, to the byte.
        assert plain["backward"] == keeping["backward"] != [], strategy
        assert recomputing["backward"] == sorted(keeping["backward"] + plain["forward"]), strategy


@pytest.mark.parametrize("mixer", MIXERS)
def test_kept_mixers_repeat_no_message_and_recomputed_ones_one_forward(mixer: str) -> None:
    run_distributed(3, _check_policies, mixer)


def _check_compiled(rank: int, world: int, mixer: str) -> None:
    for strategy in ("auto", "ulysses"):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(_layer, backend=counter, fullgraph=True)
        compilations = []
        for bounds in ([0, 24], [0, 10, 24], [0, 3, 3, 24], [0, 12, 24]):
            shard = SequenceShard(24, world_group(), "zigzag", bounds)  # other documents in every batch
            torch.manual_seed(rank)
            x, weight = torch.randn(1, shard.local_length, 24), torch.randn(24, sum(WIDTHS)) / 5
            leaves = [leaf.requires_grad_() for leaf in (x, weight)]
            results = []
            for layer in (_layer, compiled):
                y = layer(x, weight, shard, mixer, strategy)
                y.square().sum().backward()
                results.append([y.detach(), *(leaf.grad for leaf in leaves)])
                for leaf in leaves:
                    leaf.grad = None
            for result, truth in zip(results[1], results[0], strict=True):
                torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-5)
            compilations.append(counter.frame_count)
        # The second shard may show the compiler that the handle is not constant; no later one compiles anything.
        assert compilations[1] == compilations[2] == compilations[3] <= 2


@pytest.mark.parametrize("mixer", MIXERS)
def test_compiled_layers_are_one_graph_and_new_documents_compile_nothing(mixer: str) -> None:
    run_distributed(2, _check_compiled, mixer, timeout=200)


def _arguments(mixer: str, shard: SequenceShard, dtype: torch.dtype) -> tuple[list[Any], dict[str, Any]]:
    """An operator's tensors (the initial state last) and options, all of them wanting gradients."""
    seeded, rows = torch.Generator().manual_seed(shard.rank), (1, shard.local_length)
    shapes = {"q": (*rows, 2, 4), "k": (*rows, 2, 4), "v": (*rows, 6, 5), "beta": (*rows, 6), "slot": (*rows, 6, 3)}
    shapes["log_decay"] = shapes["slot"] if mixer == "slot_attention" else shapes["beta"]
    tensors = []
    for name in PAIRS[mixer].mixer.arguments:
        x = torch.randn(shapes[name], generator=seeded)
        x = -x.abs() if name == "log_decay" else F.normalize(x, dim=-1) if name == "k" else x
        tensors.append(x.to(dtype).requires_grad_())
    state = PAIRS[mixer].mixer.sizes(tensors)
    tensors.append(torch.randn(state.state, generator=seeded).to(state.dtype).requires_grad_())
    options = {
        "shard": shard.handle, "scale": 0.5, "backend": "torch", "return_state": True, "initial_gradient": True,
        "gradients": True,
    }  # fmt: skip
    return tensors, options


def _check_operators(rank: int, world: int, mixer: str) -> None:
    shard = SequenceShard(9 * world, world_group(), "zigzag", [0, 3, 9 * world])
    for strategy in STRATEGIES:
        tensors, options = _arguments(mixer, shard, torch.float32)
        torch.library.opcheck(
            PAIRS[mixer].forward,
            tuple(tensors),
            {**options, "strategy": strategy},
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        for dtype in (torch.bfloat16, torch.float64):
            tensors, options = _arguments(mixer, shard, dtype)
            real = PAIRS[mixer].forward(*tensors, **options, strategy=strategy)
            (real[0].sum() + real[1].sum()).backward()
            mode = FakeTensorMode()
            fake = [mode.from_tensor(x) for x in tensors]
            with mode:
                results = PAIRS[mixer].forward(*fake, **options, strategy=strategy)
                (results[0].sum() + results[1].sum()).backward()
            for mine, truth in zip(results, real, strict=True):
                assert (mine.shape, mine.dtype) == (truth.shape, truth.dtype), strategy
            for mine, truth in zip(fake, tensors, strict=True):
                assert mine.grad is not None and truth.grad is not None
                assert (mine.grad.shape, mine.grad.dtype) == (truth.grad.shape, truth.grad.dtype)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_operators_keep_what_they_register(mixer: str) -> None:
    run_distributed(2, _check_operators, mixer)


def test_a_shard_lives_until_backward() -> None:
    x, decay = torch.randn(1, 5, 2, 4, requires_grad=True), -torch.rand(1, 5, 2, 4)
    for call in (sequence_parallel_linear_attention, partial(sequence_parallel_delta_rule, beta=torch.rand(1, 5, 2))):
        out, _ = call(q=x, k=x, v=x, log_decay=decay, shard=SequenceShard(5))
        out.sum().backward()
    out, _ = sequence_parallel_slot_attention(x, x, x, x, decay, SequenceShard(5))
    out.sum().backward()
    assert x.grad is not None
