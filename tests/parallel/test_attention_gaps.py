"""What the comparisons in float64 cannot see: where numbers are rounded, and what is sent for nothing."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from longtrain.kernels import softmax_attention
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed
from tests.parallel.attention_cases import Case, local_parts, whole_inputs, with_gradients
from tests.parallel.comparing import squared_errors, world_group

# With four ranks each of the two key heads goes to two members of a Ulysses team. Every query sees every key, so no
# rank's share of a gradient is small beside the others.
ROUNDED = Case(tokens=256, layout="zigzag", causal=False, heads=8, groups=2, key_width=16, value_width=16, sinks=True)


def _group(rows: int, world: int) -> Any:
    if rows == 1:
        return world_group()
    return init_device_mesh("cpu", (rows, world // rows), mesh_dim_names=("outer", "inner"))


def _bfloat16_inputs() -> dict[str, Tensor]:
    """The case's inputs, of which q, k, v and sinks are what bfloat16 can hold."""
    inputs = whole_inputs(ROUNDED)
    return inputs | {name: inputs[name].bfloat16().double() for name in ("q", "k", "v", "sinks")}


def _one_device(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return softmax_attention(q, k, v, causal=False, sinks=sinks)


def _check_bfloat16(rank: int, world: int, rows: int, strategy: str) -> list[dict[str, float]]:
    """Squared errors of this rank's tokens in bfloat16: over ranks, and on one device by the operator itself."""
    shard = SequenceShard(ROUNDED.tokens, _group(rows, world), ROUNDED.layout)

    def over_ranks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return sequence_parallel_attention(q, k, v, shard, causal=False, sinks=sinks, strategy=strategy)

    inputs = _bfloat16_inputs()
    truth = local_parts(with_gradients(_one_device, inputs, torch.float64, sinks=True), shard, None)
    single = local_parts(with_gradients(_one_device, inputs, torch.bfloat16, sinks=True), shard, None)
    spread = with_gradients(over_ranks, local_parts(inputs, shard, None), torch.bfloat16, sinks=True)
    for results in (truth, single, spread):
        del results["dsinks"]  # each rank's own part
    return [squared_errors(spread, truth), squared_errors(single, truth)]


@pytest.mark.parametrize(
    ("rows", "strategy"),
    [(1, "ring"), (2, "ring"), (1, "allgather"), (1, "ulysses"), (2, "mesh")],
    ids=["ring", "double ring", "allgather", "ulysses", "mesh"],
)
def test_bfloat16_loses_nothing_over_ranks(rows: int, strategy: str) -> None:
    """Partial results, shares of gradients, and what sinks join are float32: only the end result is rounded."""
    errors = run_distributed(4, _check_bfloat16, rows, strategy)
    for name in errors[0][0]:
        spread, single = (sum(of_rank[which][name] for of_rank in errors) ** 0.5 for which in (0, 1))
        # lse is float32 itself, and each merge rounds it.
        assert 0 < spread <= (4 if name == "lse" else 1.1) * single, (name, spread, single)


def _hull(shard: SequenceShard, reader: int, holder: int, options: dict[str, Any]) -> int:
    """Keys from the first to the last that the reader sees of the holder's."""
    keys = shard.as_rank(reader).intervals(holder, **options)
    seeing = keys.lo < keys.hi
    return int(keys.hi[seeing].max() - keys.lo[seeing].min()) if seeing.any() else 0


def _check_windows(rank: int, world: int) -> None:
    options: dict[str, Any] = {"causal": False, "window": (7, 2)}
    row = 2 * 2 * 4 * 4  # bytes of K and V for a token: two heads of four float32 numbers
    for layout, documents in (("contiguous", None), ("striped:4", (0, 30, 30, 61)), ("zigzag", (0, 20, 61))):
        shard = SequenceShard(61, world_group(), layout, documents)
        others = [other for other in range(world) if other != rank]
        shown = row * sum(_hull(shard, other, rank, options) for other in others)
        seen = row * sum(_hull(shard, rank, other, options) for other in others)
        for strategy in ("ring", "allgather"):
            x = torch.randn(1, shard.local_length, 2, 4, requires_grad=True)
            with count_messages() as forward:
                out, _ = sequence_parallel_attention(x, x, x, shard, strategy=strategy, **options)
            with count_messages() as backward:
                out.sum().backward()
            exchanged = [sum(x.sent_bytes for x in of.messages if x.kind == "exchange") for of in (forward, backward)]
            if strategy == "allgather":  # shares of dK and dV alone travel between two ranks
                assert exchanged == [0, seen], (layout, exchanged, shown, seen)
            else:  # K and V, and in backward once more but for the last hop
                assert exchanged[0] == shown and seen <= exchanged[1] <= seen + shown, (layout, exchanged, shown, seen)


def test_windows_send_only_what_is_seen() -> None:
    run_distributed(3, _check_windows)


def _check_kept(rank: int, world: int) -> None:
    """All ranks see all: K and V travel once in forward and once in backward, and dK and dV once."""
    shard = SequenceShard(8 * world, world_group())
    block = 2 * 8 * 2 * 4 * 4
    for strategy in ("ring", "ulysses"):
        x = torch.randn(1, 8, 2, 4, requires_grad=True)
        attend = partial(sequence_parallel_attention, shard=shard, causal=False, strategy=strategy)
        policy = partial(
            create_selective_checkpoint_contexts, [torch.ops.longtrain.sequence_parallel_attention.default]
        )
        with count_messages() as forward:
            out, _ = checkpoint(attend, x, x, x, use_reentrant=False, context_fn=policy)
        with count_messages() as backward:
            out.sum().backward()
        sent = sum(message.sent_bytes for message in forward.messages if message.kind == "exchange")
        if strategy == "ring":
            assert sent == block * (world - 1) and backward.sent_bytes == 2 * sent
        else:  # a team of all: queries and out (dq) travel too; in forward lse, in backward q, dout and again lse
            assert backward.count() == forward.count() - 1  # without the handshake


def test_kept_attention_sends_nothing_of_forward_again() -> None:
    run_distributed(2, _check_kept)
