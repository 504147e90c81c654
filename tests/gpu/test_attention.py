"""On one card: ranks over gloo with CUDA tensors, every strategy against a dense float64 softmax, and bfloat16.

Two and four processes share the card, so no link between cards is tested: NCCL is not measured here.
"""

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from longtrain.parallel import SequenceShard, sequence_parallel_attention
from tests.distributed import run_distributed
from tests.parallel.attention_cases import Case, Group, dense, local_parts, shards, whole_inputs, with_gradients
from tests.parallel.comparing import relative_error, squared_errors, world_group

pytestmark = pytest.mark.gpu
STRATEGIES = ("ring", "allgather", "ulysses", "mesh", "auto")
CASES = (
    Case(tokens=203, layout="zigzag", heads=8, groups=2, key_width=32, value_width=32),
    Case(tokens=203, layout="striped", heads=8, groups=4, key_width=32, value_width=16, window=(40, 0), sinks=True),
    Case(tokens=203, layout="balanced", documents=(0, 50, 50, 130, 203), heads=8, groups=8, softcap=5.0),
    Case(tokens=203, layout="contiguous", keys=97, key_layout="zigzag", heads=8, groups=1),
)


def _on_card(case: Case, dtype: torch.dtype, strategy: str, group: Group) -> dict[str, Tensor]:
    shard, key_shard = shards(case, group)
    inputs = {name: x.cuda() for name, x in local_parts(whole_inputs(case), shard, key_shard).items()}

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
        return sequence_parallel_attention(
            q,
            k,
            v,
            shard,
            key_shard=key_shard,
            causal=case.causal,
            window=case.window,
            softcap=case.softcap,
            sinks=sinks,
            strategy=strategy,
        )

    results = with_gradients(attend, inputs, dtype, sinks=case.sinks)
    return {name: x.cpu() for name, x in results.items() if name != "dsinks"}


def _check(
    rank: int, world: int, rows: int, truth_of: list[dict[str, Tensor]], one_of: list[dict[str, Tensor]]
) -> None:
    group: Group = world_group()
    if rows > 1:  # gloo carries the tensors of a card through the host, so the mesh is one of processes, "cpu"
        group = init_device_mesh("cpu", (rows, world // rows), mesh_dim_names=("outer", "inner"))
    for case, truth, one in zip(CASES, truth_of, one_of, strict=True):
        parts = shards(case, group)
        local, lost = local_parts(truth, *parts), local_parts(one, *parts)
        for strategy in STRATEGIES:
            if strategy == "ulysses" and rows > 1:
                continue
            for dtype in (torch.float64, torch.float32):
                for name, x in _on_card(case, dtype, strategy, group).items():
                    error = relative_error(x, local[name], truth[name])
                    dense_error = relative_error(lost[name], local[name], truth[name])
                    budget = 1e-10 if dtype == torch.float64 else max(4 * dense_error, 1e-6)
                    assert error <= budget, (name, error, budget, strategy, dtype, case)


@pytest.mark.parametrize(("world", "rows"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_every_strategy_on_a_card(world: int, rows: int) -> None:
    truths = [dense(case, torch.float64) for case in CASES]
    run_distributed(world, _check, rows, truths, [dense(case, torch.float32) for case in CASES], timeout=300)


def _errors(rank: int, world: int, truth: dict[str, Tensor]) -> dict[str, float]:
    case = Case(tokens=1024, layout="zigzag", heads=8, groups=2, key_width=64, value_width=64)
    shard = SequenceShard(case.tokens, world_group(), case.layout)
    inputs = {name: x.cuda() for name, x in local_parts(whole_inputs(case), shard, None).items()}
    results = with_gradients(
        lambda q, k, v, _: sequence_parallel_attention(q, k, v, shard), inputs, torch.bfloat16, sinks=False
    )
    return squared_errors({name: x.cpu() for name, x in results.items()}, local_parts(truth, shard, None))


def test_bfloat16_over_ranks_loses_what_one_rank_loses() -> None:
    case = Case(tokens=1024, heads=8, groups=2, key_width=64, value_width=64)
    alone = SequenceShard(case.tokens)
    truth = with_gradients(
        lambda q, k, v, _: sequence_parallel_attention(q, k, v, alone),
        whole_inputs(case),
        torch.float64,
        sinks=False,
    )
    one, four = (run_distributed(world, _errors, truth) for world in (1, 4))
    for name in truth:
        alone_error, spread_error = (sum(rank[name] for rank in ranks) ** 0.5 for ranks in (one, four))
        assert 0 < spread_error <= 1.1 * alone_error, (name, spread_error, alone_error)
