"""Attention as one registered step: what recompute repeats, and what compiled and fake-tensor runs see."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.attention import operators
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group

KEPT = [torch.ops.longtrain.sequence_parallel_attention.default]
STRATEGIES = ("ring", "allgather", "ulysses", "mesh")


def _layer(x: Tensor, weight: Tensor, shard: SequenceShard, strategy: str) -> Tensor:
    """A projection, attention of 4 heads over 2 key heads, and something after it that wants the result."""
    q, k, v = (x @ weight).unflatten(-1, (8, 4)).split((4, 2, 2), dim=2)
    out, lse = sequence_parallel_attention(q, k, v, shard, strategy=strategy)
    return x + (out * lse.sigmoid()[..., None]).flatten(2)


def _run(
    policy: str, shard: SequenceShard, strategy: str, layers: int = 2
) -> tuple[list[Tensor], dict[str, tuple[int, int]]]:
    """Results and gradients of some layers, and the exchanges and gathers (number, bytes) of forward and backward."""
    seeded = torch.Generator().manual_seed(5)
    whole = torch.randn(1, shard.length, 16, generator=seeded)
    weights = [torch.randn(16, 32, generator=seeded).div(4).requires_grad_() for _ in range(layers)]
    x = shard.split(whole, dim=1).requires_grad_()
    y = x
    with count_messages() as forward:
        for weight in weights:
            layer: Callable[..., Tensor] = partial(_layer, shard=shard, strategy=strategy)
            if policy == "none":
                y = layer(y, weight)
            elif policy == "full":
                y = checkpoint(layer, y, weight, use_reentrant=False)
            else:
                y = checkpoint(
                    layer,
                    y,
                    weight,
                    use_reentrant=False,
                    context_fn=partial(create_selective_checkpoint_contexts, KEPT),
                )
    with count_messages() as backward:
        y.square().sum().backward()
    gradients = [leaf.grad for leaf in (x, *weights)]
    assert all(gradient is not None for gradient in gradients)
    traffic = {}
    for name, counter in (("forward", forward), ("backward", backward)):
        # The handshake is a gather of 32 bytes from each rank.
        sent = [message for message in counter.messages if message.sent_bytes != 32 * (shard.world - 1)]
        traffic[name] = len(sent), sum(message.sent_bytes for message in sent)
    return [y.detach(), *(gradient for gradient in gradients if gradient is not None)], traffic


def _check_policies(rank: int, world: int) -> None:
    shard = SequenceShard(29, world_group(), "zigzag", [0, 10, 29])
    for strategy in STRATEGIES:
        if strategy == "ulysses" and 4 % world:
            continue
        expected, plain = _run("none", shard, strategy)
        kept, keeping = _run("keep", shard, strategy)
        full, recomputing = _run("full", shard, strategy)
        for results in (kept, full, _run("keep", shard, strategy)[0]):
            for result, truth in zip(results, expected, strict=True):
                assert torch.equal(result, truth), strategy  # the same steps in the same order
        assert plain["forward"] == keeping["forward"] == recomputing["forward"]
        # Kept: backward's own messages and nothing of forward's. Recomputed: one more forward, to the byte.
        for count in (0, 1):
            assert recomputing["backward"][count] == keeping["backward"][count] + plain["forward"][count], strategy
        # Where nothing is recomputed, what forward held last need not travel again.
        assert plain["backward"][1] <= keeping["backward"][1]
        assert plain["backward"][1] < keeping["backward"][1] or strategy == "allgather" or world == 1


@pytest.mark.parametrize("world", [2, 3])
def test_kept_attention_repeats_no_message_and_recomputed_attention_one_forward(world: int) -> None:
    run_distributed(world, _check_policies)


def _check_the_held_hop(rank: int, world: int) -> None:
    """One document, all ranks see all: the ring's backward saves just one hop of K and V."""
    shard = SequenceShard(8 * world, world_group())
    x = torch.randn(1, 8, 2, 4, requires_grad=True)
    with count_messages() as forward:
        out, _ = sequence_parallel_attention(x, x, x, shard, causal=False, strategy="ring")
    block = 2 * 8 * 2 * 4 * 4
    hops = [message.sent_bytes for message in forward.messages if message.kind == "exchange"]
    assert hops == [block] * (world - 1)
    with count_messages() as backward:
        out.sum().backward()
    assert backward.sent_bytes == block * (world - 2) + block * (world - 1)  # K and V; dK and dV


def test_backward_starts_from_the_keys_that_forward_held_last() -> None:
    run_distributed(4, _check_the_held_hop)


def _check_compiled(rank: int, world: int) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_layer, backend=counter, fullgraph=True)
    compilations = []
    for bounds in ([0, 24], [0, 10, 24], [0, 3, 3, 24], [0, 12, 24]):
        shard = SequenceShard(24, world_group(), "zigzag", bounds)  # other documents in every batch
        torch.manual_seed(rank)
        x, weight = torch.randn(1, shard.local_length, 16), torch.randn(16, 32) / 4
        leaves = [leaf.requires_grad_() for leaf in (x, weight)]
        results = []
        for layer in (_layer, compiled):
            y = layer(x, weight, shard, "ring")
            y.square().sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves)])
            for leaf in leaves:
                leaf.grad = None
        for result, truth in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(result, truth, rtol=1e-5, atol=1e-6)
        compilations.append(counter.frame_count)
    # The second shard may show the compiler that the handle is not constant; no later one compiles anything.
    assert compilations[1] == compilations[2] == compilations[3] <= 2


def test_compiled_layers_are_one_graph_and_new_documents_compile_nothing() -> None:
    run_distributed(2, _check_compiled, timeout=200)


def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones() -> None:
    shard, keys = SequenceShard(9), SequenceShard(5)
    for dtype in (torch.bfloat16, torch.float64):
        q = torch.randn(2, 9, 4, 8, dtype=dtype, requires_grad=True)
        k, v = torch.randn(2, 5, 2, 8, dtype=dtype), torch.randn(2, 5, 2, 6, dtype=dtype)
        for sinks in (None, torch.zeros(4, dtype=dtype)):
            real = sequence_parallel_attention(q, k, v, shard, key_shard=keys, sinks=sinks)
            mode = FakeTensorMode()
            fake = [None if x is None else mode.from_tensor(x) for x in (q, k, v, sinks)]
            with mode:
                assert fake[0] is not None and fake[1] is not None and fake[2] is not None
                results = sequence_parallel_attention(fake[0], fake[1], fake[2], shard, key_shard=keys, sinks=fake[3])
                results[0].sum().backward()
            for mine, truth in zip(results, real, strict=True):
                assert (mine.shape, mine.dtype) == (truth.shape, truth.dtype)
            assert fake[0].grad is not None and fake[0].grad.shape == q.shape


def _check_operators(rank: int, world: int) -> None:
    shard = SequenceShard(4 * world, world_group(), "striped", [0, 3, 4 * world])
    options: dict[str, Any] = {
        "shard": shard.handle, "key_shard": shard.handle, "causal": True, "left": None, "right": None, "scale": 0.5,
        "softcap": None, "ulysses_degree": None, "backend": "torch", "wide": False, "gradients": True,
    }  # fmt: skip
    seeded = torch.Generator().manual_seed(rank)
    for strategy in STRATEGIES:
        for keep in (False, True):
            q, k, v = (torch.randn(1, 4, heads, 8, generator=seeded, requires_grad=True) for heads in (4, 2, 2))
            torch.library.opcheck(
                operators.forward,
                (q, k, v),
                {**options, "strategy": strategy, "keep": keep, "heads_at_once": 1 if keep else None},
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
            )


def test_the_operators_keep_what_they_register() -> None:
    run_distributed(2, _check_operators)


def test_a_deleted_shard_is_told() -> None:
    with pytest.raises(RuntimeError, match="SequenceShard was deleted"):
        operators.shard_of(10**9)


def test_a_shard_lives_until_backward() -> None:
    x = torch.randn(1, 5, 2, 4, requires_grad=True)
    out, _ = sequence_parallel_attention(x, x, x, SequenceShard(5))
    out.sum().backward()
    assert x.grad is not None and dist.is_available()
