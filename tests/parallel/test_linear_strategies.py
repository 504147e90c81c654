"""What the strategies of linear mixers send, to whom and how much, and which one runs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtrain.parallel import Hardware, SequenceShard, explain_linear_attention, sequence_parallel_linear_attention
from longtrain.parallel.communication import MessageCounter, count_messages
from longtrain.parallel.linear.cost import estimates
from longtrain.parallel.linear.operators import PAIRS
from tests.distributed import run_distributed
from tests.parallel.comparing import world_group
from tests.parallel.linear_cases import (
    STRATEGIES,
    Case,
    arguments_of,
    attend_over_ranks,
    initial_of,
    local_parts,
    over_ranks,
    whole_inputs,
    with_gradients,
)

NAMES = {"linear": "linear_attention", "delta": "delta_rule", "slot": "slot_attention"}


def _received(counter: MessageCounter, world: int) -> int:
    """Bytes without the handshake's."""
    return counter.received_bytes - sum(m.received_bytes for m in counter.messages if m.sent_bytes == 32 * (world - 1))


def _traffic(case: Case) -> tuple[int, int]:
    """Bytes that this rank receives in forward and in backward, in float32."""
    shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
    local = {name: x.float() for name, x in local_parts(whole_inputs(case), shard).items()}
    leaves = {name: x.requires_grad_() for name, x in local.items() if name in case.arguments or "initial" in name}
    with count_messages() as forward:
        out, state = attend_over_ranks(case, leaves, shard)
    loss = out.square().sum()
    if state is not None:
        loss = loss + sum(part.square().sum() for part in (state if case.mixer == "slot" else [state]))
    with count_messages() as backward:
        loss.backward()
    return _received(forward, shard.world), _received(backward, shard.world)


def _check_bytes(rank: int, world: int) -> None:
    sizes: dict[str, Any] = {"key_width": 8, "value_width": 8, "slots": 8, "strategy": "alltoall"}
    for mixer, times in (("linear", 2), ("delta", 3), ("slot", 2)):
        for layout, runs in (("contiguous", 1), ("zigzag", 2)):
            case = Case(mixer, layout=layout, heads=8, groups=8, **sizes)
            state = 4 * 8 * 8 * 8 * (2 if mixer == "slot" else 1)
            found = [_traffic(replace(case, tokens=tokens)) for tokens in (64, 256)]
            assert found[0] == found[1], "independent of the length"
            assert 0 < found[0][0] <= times * runs * state, (mixer, layout, found, state)
            assert 0 < found[0][1] <= 2 * runs * state
    # Heads that do not divide among the ranks: still equal shares of the columns.
    forward, backward = _traffic(Case(heads=3, groups=1, **sizes))
    assert forward <= 2 * 4 * 3 * 8 * 8 and backward <= 2 * 4 * 3 * 8 * 8


def test_bytes_of_the_alltoall_scan_are_a_few_states_whatever_the_ranks_and_the_length() -> None:
    run_distributed(8, _check_bytes, timeout=120)


def _check_chain(rank: int, world: int) -> list[list[tuple[int, int]]]:
    """Of each call: sent and received states of forward and of backward."""
    found = []
    for documents in ((0, 15, 20, 30), (0, 30), (0, 10, 20, 30)):
        case = Case(tokens=30, documents=documents, decay="channel", strategy="chain")
        shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
        leaves = {name: x.requires_grad_() for name, x in local_parts(whole_inputs(case), shard).items()}
        counts = []
        with count_messages() as forward:
            out, _ = attend_over_ranks(case, leaves, shard)
        with count_messages() as backward:
            out.sum().backward()
        for counter in (forward, backward):
            states = [m for m in counter.messages if m.kind == "exchange"]
            size = 8 * case.heads * case.key_width * case.value_width
            assert all(m.sent_bytes + m.received_bytes == size for m in states)
            counts.append((sum(m.sent_bytes > 0 for m in states), sum(m.received_bytes > 0 for m in states)))
        found.append(counts)
    return found


def test_a_chain_sends_states_only_within_documents() -> None:
    first, last, both, nothing = [(1, 0), (0, 1)], [(0, 1), (1, 0)], [(1, 1), (1, 1)], [(0, 0), (0, 0)]
    ranks = run_distributed(3, _check_chain)
    assert [of_rank[0] for of_rank in ranks] == [first, last, nothing]  # token 20 begins a document and rank 2
    assert [of_rank[1] for of_rank in ranks] == [first, both, last]
    assert [of_rank[2] for of_rank in ranks] == [nothing] * 3


def _check_estimates(rank: int, world: int) -> list[tuple[float, float]]:
    """Of each case: bytes that this rank receives, and those that the model counts."""
    found = []
    for mixer in NAMES:
        for layout in ("contiguous", "zigzag"):
            for strategy in STRATEGIES:
                case = Case(mixer, tokens=36, layout=layout, heads=6, groups=3, strategy=strategy)
                shard = SequenceShard(36, world_group(), layout)
                local = {name: x.float() for name, x in local_parts(whole_inputs(case), shard).items()}
                rows = estimates(
                    PAIRS[NAMES[mixer]].mixer,
                    arguments_of(case, local),
                    shard,
                    return_state=False,
                    hardware=Hardware(1.0, 1.0, 1.0, 1.0),
                )
                found.append((float(sum(_traffic(case))), {row.strategy: row.received for row in rows}[strategy]))
    return found


def test_the_model_counts_the_bytes_that_travel() -> None:
    for of_case in zip(*run_distributed(3, _check_estimates), strict=True):
        assert max(received for received, _ in of_case) == pytest.approx(of_case[0][1])


def _strategies_of(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines()[1:-1]]


def test_auto_gathers_small_states_on_few_ranks_and_scatters_those_of_many() -> None:
    def explain(world: int, heads: int, **options: Any) -> list[str]:
        shard = SequenceShard.pretend(1 << 20, rank=0, world=world)
        return _strategies_of(explain_linear_attention(shard, heads=heads, key_width=128, device="cuda", **options))

    assert explain(4, 4)[0] == "allgather"
    assert explain(2, 4)[0] == "chain"  # one hop
    assert explain(64, 32)[0] == "alltoall"
    assert explain(64, 32, mixer="delta_rule")[0] == "alltoall"
    assert explain(64, 32, mixer="slot_attention", slots=64)[0] == "alltoall"
    assert sorted(explain(4, 32)) == sorted(STRATEGIES)
    assert "ulysses" not in explain(3, 32)
    with pytest.raises(ValueError, match="mixer: got 'linear'"):
        explain(2, 4, mixer="linear")
    with pytest.raises(ValueError, match="slots: got None"):
        explain(2, 4, mixer="slot_attention")
    with pytest.raises(ValueError, match="decay: got 'fast'"):
        explain(2, 4, decay="fast")


def _check_auto(rank: int, world: int) -> None:
    # What is cheapest with this many bytes is what runs: few tokens, and states that outweigh them.
    kinds = set()
    for tokens, width in ((6, 128), (600, 8)):
        shard = SequenceShard(tokens, world_group())
        x = torch.randn(1, shard.local_length, 4, width)
        rows = estimates(
            PAIRS["linear_attention"].mixer,
            (x, x, x, None),
            shard,
            return_state=False,
            hardware=Hardware(7e10, 4e8, 4e8, 3e-4),
        )
        with count_messages() as auto:
            sequence_parallel_linear_attention(x, x, x, None, shard)
        with count_messages() as named:
            sequence_parallel_linear_attention(x, x, x, None, shard, strategy=rows[0].strategy)
        assert auto.messages == named.messages
        kinds.add(rows[0].strategy)
    assert len(kinds) == 2


def test_auto_runs_what_the_model_finds_cheapest() -> None:
    run_distributed(2, _check_auto)


def _check_refusals(rank: int, world: int) -> None:
    shard = SequenceShard(7, world_group())
    x = torch.randn(1, shard.local_length, 4, 5)
    with pytest.raises(ValueError, match=r"strategy: got 'ulysses' with H = 4 heads over 3 ranks.*'alltoall' and"):
        sequence_parallel_linear_attention(x, x, x, None, shard, strategy="ulysses")
    six, two = x.repeat(1, 1, 3, 1)[:, :, :6], x[:, :, :2]
    with pytest.raises(ValueError, match=r"strategy: got 'ulysses' with 2 heads of q and 6 of k"):
        sequence_parallel_linear_attention(two, six, six, None, shard, strategy="ulysses")


def test_ulysses_refuses_heads_that_do_not_divide() -> None:
    run_distributed(3, _check_refusals)


def _check_containment(rank: int, world: int, mixer: str) -> None:
    # Documents of tokens 0-9, 10-24, 25-36; NaN in the middle one, in head 0 only.
    for strategy in STRATEGIES:
        case = Case(
            mixer, layout="zigzag", documents=(0, 10, 25, 37), heads=3, groups=3, initial=True, state=True,
            strategy=strategy,
        )  # fmt: skip
        shard = SequenceShard(case.tokens, world_group(), case.layout, case.documents)
        inputs = whole_inputs(case)
        clean, dirty = (_results(case, shard, x) for x in (inputs, _spoiled(inputs)))
        elsewhere = (shard.positions < 10) | (shard.positions >= 25)
        for name in ("out", *("d" + name for name in case.arguments)):
            # (Beside a NaN a chunk may be computed in another way, which rounds otherwise.)
            for rows in ((slice(None), elsewhere), (slice(None), slice(None), slice(1, None))):
                torch.testing.assert_close(dirty[name][rows], clean[name][rows], rtol=1e-4, atol=1e-6)
        for name in case.states:
            torch.testing.assert_close(dirty["state_" + name], clean["state_" + name])
            assert dirty["dinitial_" + name].isfinite().all()
        assert dirty["out"][:, shard.positions == 24, 0].isnan().all()  # and who sees it is told


def _spoiled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    inputs = {name: x.clone() for name, x in inputs.items()}
    for name, token in (("k", 12), ("decay", 17), ("dout", 20)):
        inputs[name][:, token, 0] = torch.nan
    return inputs


def _results(case: Case, shard: SequenceShard, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = 1 / shard.world
    local = local_parts(inputs, shard)
    return with_gradients(case, lambda x: attend_over_ranks(case, x, shard), local, torch.float32, state_weight=weight)


@pytest.mark.parametrize("mixer", list(NAMES))
def test_nan_stays_in_its_document_and_head(mixer: str) -> None:
    run_distributed(3, _check_containment, mixer)


def _check_repeats(rank: int, world: int) -> None:
    for mixer in NAMES:
        for strategy in STRATEGIES:
            case = Case(mixer, layout="zigzag", heads=3, groups=1, initial=True, state=True, strategy=strategy)
            once, again = (over_ranks(case, torch.float32, world_group()) for _ in range(2))
            assert all(torch.equal(once[name], again[name]) for name in once), case


def test_two_runs_are_bitwise_equal() -> None:
    run_distributed(3, _check_repeats)


def _check_pieces(rank: int, world: int, case: Case) -> None:
    """A prompt in two pieces, the state handed on, is the prompt at once."""
    whole = whole_inputs(case)
    outs: dict[str, Tensor] = {}
    for name, pieces in (("once", [(0, 41)]), ("pieces", [(0, 17), (17, 41)])):
        state, parts = None, []
        for start, stop in pieces:
            shard = SequenceShard(stop - start, world_group(), case.layout)
            x = {key: shard.split(whole[key][:, start:stop], dim=1) for key in case.arguments}
            if state is not None:
                x |= {"initial_" + key: part for key, part in zip(case.states, state, strict=True)}
            assert (initial_of(case, x) is None) == (state is None)
            out, state = attend_over_ranks(case, x, shard)
            state = state if case.mixer == "slot" else (state,)
            parts.append(shard.gather(out, dim=1))
        outs[name] = torch.cat([torch.cat(parts, dim=1).flatten(), *(part.flatten() for part in state or ())])
    torch.testing.assert_close(outs["pieces"], outs["once"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_long_prompt_in_pieces(strategy: str) -> None:
    for mixer in NAMES:
        case = Case(mixer, tokens=41, layout="zigzag", heads=3, groups=3, state=True, strategy=strategy)
        run_distributed(3, _check_pieces, case)
