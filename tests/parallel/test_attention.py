"""Ring attention over ranks against a dense float64 softmax on whole tensors, gradients of out and lse included."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longtrain.kernels.softmax_attention import softmax_attention
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from longtrain.parallel.communication import count_messages
from tests.distributed import run_distributed

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass(frozen=True)
class Case:
    """One call, on whole tensors; `keys` and what begins with `key_` make it cross-attention."""

    tokens: int = 37
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    keys: int | None = None
    key_layout: str = "contiguous"
    key_documents: tuple[int, ...] | None = None
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False
    batch: int = 1
    heads: int = 2
    groups: int = 2
    key_width: int = 8
    value_width: int = 8
    dominant_keys: bool = False
    backend: str = "auto"


# A cover of the options by hand: each layout meets each kind of mask, and each option at least two layouts.
CASES = (
    Case(layout="contiguous"),
    Case(layout="zigzag", batch=2, heads=4, groups=2, value_width=5),
    Case(layout="striped", heads=4, groups=1, softcap=2.5, window=(9, None)),
    Case(layout="striped:3", sinks=True, heads=3, groups=3, key_width=5),
    Case(layout="contiguous", documents=(0, 5, 5, 18, 23, 37), heads=6, groups=2, sinks=True),
    Case(layout="zigzag", documents=(0, 1, 12, 36, 37), window=(4, 0), softcap=1.5),
    Case(layout="striped", documents=(0, 16, 17, 37), value_width=3, scale=0.7),
    Case(layout="striped:3", documents=(0, 0, 20, 37), causal=False, window=(3, 5)),
    Case(layout="contiguous", causal=False, window=(None, 2), heads=4, groups=2),
    Case(layout="zigzag", causal=False, batch=2, sinks=True),
    Case(layout="striped", tokens=3, heads=4, groups=2),
    Case(layout="zigzag", tokens=2, documents=(0, 1, 2)),
    Case(layout="contiguous", tokens=1, causal=False, softcap=2.0),
    Case(layout="striped:3", tokens=41, window=(0, 0)),
    Case(layout="zigzag", keys=53, key_layout="striped", causal=False, value_width=6),
    Case(layout="striped", keys=19, key_layout="zigzag", heads=4, groups=2),  # more queries than keys: some see nothing
    Case(
        layout="contiguous",
        documents=(0, 11, 30, 37),
        keys=29,
        key_layout="striped:3",
        key_documents=(0, 20, 20, 29),
        window=(6, 1),
        causal=False,
        sinks=True,
    ),
    Case(layout="striped", keys=3, key_layout="contiguous", causal=False),
    Case(layout="zigzag", documents=(0, 13, 37), backend="reference", softcap=3.0, sinks=True),
)


def world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    return group


def whole_inputs(case: Case) -> dict[str, Tensor]:
    """The same float64 tensors on every rank: q, k, v, sinks, and the gradients of out and lse."""
    seeded = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seeded, dtype=torch.float64)

    keys = case.tokens if case.keys is None else case.keys
    q = normal(case.batch, case.tokens, case.heads, case.key_width)
    k = normal(case.batch, keys, case.groups, case.key_width)
    if case.dominant_keys:
        k *= 10
        k[:, 1::11] *= torch.linspace(5, 30, k[:, 1::11].shape[1], dtype=k.dtype)[:, None, None]
    return {
        "q": q,
        "k": k,
        "v": normal(case.batch, keys, case.groups, case.value_width),
        "sinks": normal(case.heads),
        "dout": normal(case.batch, case.tokens, case.heads, case.value_width),
        "dlse": normal(case.batch, case.tokens, case.heads),
    }


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def with_gradients(attend: Attend, inputs: dict[str, Tensor], dtype: torch.dtype, *, sinks: bool) -> dict[str, Tensor]:
    """out, lse and all gradients of one call on `inputs`, whose loss weighs out and lse at random."""
    leaves = {name: inputs[name].to(dtype, copy=True).requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, lse = attend(leaves["q"], leaves["k"], leaves["v"], leaves["sinks"] if sinks else None)
    assert lse is not None and out.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert lse.dtype == wide
    loss = (out.to(wide) * inputs["dout"].to(wide)).sum()
    # Queries that see nothing have an lse of -inf, which no loss uses.
    loss = loss + (lse.masked_fill(lse == -torch.inf, 0) * inputs["dlse"].to(wide)).sum()
    loss.backward()
    results = {"out": out.detach(), "lse": lse.detach()}
    for name in ("q", "k", "v") + (("sinks",) if sinks else ()):
        gradient = leaves[name].grad
        assert gradient is not None and gradient.dtype == dtype
        results["d" + name] = gradient
    return results


def dense(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The whole call on one device, by definition."""

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        documents, key_documents = (
            None if bounds is None else torch.tensor(bounds) for bounds in (case.documents, case.key_documents)
        )
        return softmax_attention(
            q,
            k,
            v,
            causal=case.causal,
            window=case.window,
            cu_seqlens=documents,
            cu_seqlens_k=key_documents,
            scale=case.scale,
            softcap=case.softcap,
            sinks=sinks,
            backend="reference",
        )

    return with_gradients(attend, whole_inputs(case), dtype, sinks=case.sinks)


def shards(case: Case, group: dist.ProcessGroup | None) -> tuple[SequenceShard, SequenceShard | None]:
    shard = SequenceShard(case.tokens, group, case.layout, case.documents)
    if case.keys is None:
        return shard, None
    return shard, SequenceShard(case.keys, group, case.key_layout, case.key_documents)


def local_parts(whole: dict[str, Tensor], shard: SequenceShard, key_shard: SequenceShard | None) -> dict[str, Tensor]:
    """This rank's tokens of whole tensors."""
    rows = {name: key_shard or shard if name in ("k", "v", "dk", "dv") else shard for name in whole}
    return {name: x if x.ndim == 1 else rows[name].split(x, dim=1) for name, x in whole.items()}


def over_ranks(
    case: Case, dtype: torch.dtype, group: dist.ProcessGroup | None, strategy: str = "auto"
) -> dict[str, Tensor]:
    """This rank's results of the call over the group, with the sinks' gradient summed over the group."""
    shard, key_shard = shards(case, group)

    def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return sequence_parallel_attention(
            q,
            k,
            v,
            shard,
            key_shard=key_shard,
            causal=case.causal,
            window=case.window,
            scale=case.scale,
            softcap=case.softcap,
            sinks=sinks,
            strategy=strategy,
            backend=case.backend,
        )

    results = with_gradients(attend, local_parts(whole_inputs(case), shard, key_shard), dtype, sinks=case.sinks)
    if case.sinks and group is not None:
        dist.all_reduce(results["dsinks"], group=group)
    return results


def relative_errors(
    case: Case, results: dict[str, Tensor], truth: dict[str, Tensor], group: dist.ProcessGroup | None
) -> dict[str, float]:
    """The error of each of this rank's tensors in units of the true tensor; what is -inf must be -inf."""
    errors = {}
    local_truth = local_parts(truth, *shards(case, group))
    for name, result in results.items():
        local, whole = local_truth[name], truth[name]
        assert result.shape == local.shape, (name, result.shape, local.shape)
        assert torch.equal(result == -torch.inf, local == -torch.inf), name
        difference = torch.where(local == -torch.inf, 0, result.double() - local)
        finite = whole.masked_fill(whole == -torch.inf, 0)
        # A rank may hold a few nearly-zero rows: they are measured by a small part of the whole tensor's size.
        size = max(local.masked_fill(local == -torch.inf, 0).norm(), 1e-3 * finite.norm())
        errors[name] = float(difference.norm() / size) if size else float(difference.norm())
    return errors


@cache
def truths(cases: tuple[Case, ...], dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """What every case comes to, computed once in the test's own process for all ranks and worlds."""
    return [dense(case, dtype) for case in cases]


def _check_cases(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    for case, truth in zip(cases, truth_of, strict=True):
        errors = relative_errors(case, over_ranks(case, torch.float64, world_group()), truth, world_group())
        assert set(errors) >= set(NAMES[:5])
        for name, error in errors.items():
            assert error <= 1e-10, f"{name} is off by {error:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_equals_the_dense_softmax(world: int) -> None:
    run_distributed(world, _check_cases, CASES, truths(CASES))


def _check_float32(
    rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]], dense_of: list[dict[str, Tensor]]
) -> None:
    for case, truth, one_device in zip(cases, truth_of, dense_of, strict=True):
        shard, key_shard = shards(case, world_group())
        lost = relative_errors(case, local_parts(one_device, shard, key_shard), truth, world_group())
        errors = relative_errors(case, over_ranks(case, torch.float32, world_group()), truth, world_group())
        for name, error in errors.items():
            budget = max(4 * lost[name], 5e-6)
            assert error <= budget, f"{name}: {error:.1e} > {budget:.1e} on rank {rank} of {world} in {case}"


@pytest.mark.parametrize("world", [2, 3])
def test_float32_loses_what_one_device_loses(world: int) -> None:
    # One key dominates each shard, by another margin on each: the blocks' lse lie up to a thousand apart.
    cases = CASES[:8] + tuple(replace(case, dominant_keys=True) for case in CASES[:8])
    run_distributed(world, _check_float32, cases, truths(cases), truths(cases, torch.float32))


def _check_groups(rank: int, world: int, cases: tuple[Case, ...], truth_of: list[dict[str, Tensor]]) -> None:
    # Every process makes every group, in the same order; then the groups work at the same time.
    groups = [dist.new_group(ranks) for ranks in ([1, 3], [0, 2], [3, 0, 1])]
    group, three = groups[0 if rank in (1, 3) else 1], groups[2]
    assert isinstance(group, dist.ProcessGroup)
    for case, truth in zip(cases, truth_of, strict=True):
        for name, error in relative_errors(case, over_ranks(case, torch.float64, group), truth, group).items():
            assert error <= 1e-10, (name, error)
        if isinstance(three, dist.ProcessGroup):  # not on rank 2
            errors = relative_errors(case, over_ranks(case, torch.float64, three), truth, three)
            assert max(errors.values()) <= 1e-10, errors


def test_any_subset_of_the_ranks_is_a_group() -> None:
    cases = (CASES[4], CASES[15])
    run_distributed(4, _check_groups, cases, truths(cases))


def _check_repeats(rank: int, world: int) -> None:
    for case in CASES[:6]:
        once, again = (over_ranks(case, torch.float32, world_group()) for _ in range(2))
        for name in once:
            assert torch.equal(once[name], again[name]), (name, case)


def test_two_runs_are_bitwise_equal() -> None:
    run_distributed(3, _check_repeats)


def _check_blind_queries(rank: int, world: int) -> None:
    # 10 more queries than keys, aligned at the end: the first 10 of them stand before the first key.
    window = Case(layout="striped", keys=27, causal=False, window=(0, 0), sinks=True)
    for case in (Case(layout="zigzag", keys=27), window):
        shard, _ = shards(case, world_group())
        results = over_ranks(case, torch.float32, world_group())
        blind = shard.positions < 10
        assert (results["out"][:, blind] == 0).all() and (results["dq"][:, blind] == 0).all()
        assert (results["lse"][:, blind] == -torch.inf).all()
        assert results["lse"][:, ~blind].isfinite().all()
        assert results["dk"].isfinite().all() and results["dv"].isfinite().all()


def test_queries_that_see_nothing_get_nothing() -> None:
    run_distributed(3, _check_blind_queries)


def _check_bfloat16(rank: int, world: int) -> dict[str, tuple[float, float]]:
    """Squared errors of this rank's tokens, over ranks and on one device, and whether nothing but bfloat16 was sent."""
    case = Case(tokens=256, layout="zigzag", heads=4, groups=2, key_width=16, value_width=16)
    inputs = whole_inputs(case)
    whole = inputs | {name: inputs[name].bfloat16().double() for name in ("q", "k", "v")}  # what bfloat16 can hold
    shard = SequenceShard(case.tokens, world_group(), case.layout)
    alone = SequenceShard(case.tokens)

    def on(shard: SequenceShard) -> Attend:
        return lambda q, k, v, _: sequence_parallel_attention(q, k, v, shard)

    def by_definition(q: Tensor, k: Tensor, v: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return softmax_attention(q, k, v, backend="reference")

    truth = with_gradients(by_definition, whole, torch.float64, sinks=False)
    single = with_gradients(on(alone), whole, torch.bfloat16, sinks=False)
    spread = with_gradients(on(shard), local_parts(whole, shard, None), torch.bfloat16, sinks=False)
    truth, single = local_parts(truth, shard, None), local_parts(single, shard, None)
    return {
        name: (
            float((spread[name].double() - truth[name]).square().sum()),
            float((single[name].double() - truth[name]).square().sum()),
        )
        for name in truth
    }


def test_bfloat16_loses_nothing_to_the_ring() -> None:
    errors = run_distributed(4, _check_bfloat16)
    for name in errors[0]:
        spread, single = (sum(error[name][which] for error in errors) ** 0.5 for which in (0, 1))
        assert 0 < spread <= 1.1 * single, (name, spread, single)


def _check_containment(rank: int, world: int) -> None:
    # Documents of tokens 0-9, 10-24, 25-36; NaN and inf in the middle one, in another head of k than of v.
    case = Case(layout="striped", documents=(0, 10, 25, 37), heads=4, groups=2)
    clean = over_ranks(case, torch.float32, world_group())
    shard, _ = shards(case, world_group())
    inputs = whole_inputs(case)
    inputs["k"][:, 12, 0] = torch.nan
    inputs["v"][:, 17, 0] = torch.inf
    inputs["dout"][:, 20, 1] = torch.nan  # head 1 reads group 0
    dirty = with_gradients(
        lambda q, k, v, _: sequence_parallel_attention(q, k, v, shard),
        local_parts(inputs, shard, None),
        torch.float32,
        sinks=False,
    )
    elsewhere = (shard.positions < 10) | (shard.positions >= 25)
    for name in NAMES[:5]:
        half = clean[name].shape[2] // 2  # the heads of group 1
        assert torch.equal(dirty[name][:, elsewhere], clean[name][:, elsewhere]), name
        assert torch.equal(dirty[name][:, :, half:], clean[name][:, :, half:]), name
    assert dirty["out"][:, shard.positions == 24, :2].isnan().all()  # and who sees it is told


def test_nan_stays_in_its_document_and_head() -> None:
    run_distributed(3, _check_containment)


def _check_messages(rank: int, world: int) -> None:
    case = Case(tokens=41, layout="zigzag", heads=4, groups=2, value_width=4)
    shard, _ = shards(case, world_group())
    local = local_parts(whole_inputs(case), shard, None)
    for call in range(2):
        q, k, v = (local[name].bfloat16().requires_grad_() for name in ("q", "k", "v"))
        with count_messages() as counter:
            out, _ = sequence_parallel_attention(q, k, v, shard)
        # The handshake comes once; then K and V, in two bytes a number, of every rank but the previous ...
        assert counter.count("all_gather") == (call == 0 and world > 1)
        assert counter.count("exchange") == world - 1 and counter.count() == world - (call == 1 or world == 1)
        row = 2 * case.groups * (case.key_width + case.value_width)
        others = sum(shard.lengths) - shard.lengths[(rank + 1) % world]
        sent = sum(message.sent_bytes for message in counter.messages if message.kind == "exchange")
        assert sent == (row * others if world > 1 else 0)
        with count_messages() as counter:
            out.backward(torch.ones_like(out))
        # ... and in backward the same, with the float32 sums of dK and dV one step behind and one hop more.
        assert counter.count() == (world + 1 if world > 1 else 0)
        if world > 1:
            assert counter.sent_bytes == row * others + 2 * row * case.tokens


@pytest.mark.parametrize("world", [1, 3])
def test_messages_are_those_of_the_ring(world: int) -> None:
    run_distributed(world, _check_messages)


def _check_partial_gradients(rank: int, world: int) -> None:
    case = CASES[1]
    expected = over_ranks(case, torch.float64, world_group())
    shard, _ = shards(case, world_group())
    local = local_parts(whole_inputs(case), shard, None)
    for wanted in (("q",), ("k",), ("q", "v")):
        # Non-contiguous inputs on the way: heads and tokens in each other's place in memory.
        q, k, v = (local[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v"))
        leaves = {"q": q, "k": k, "v": v}
        for name in wanted:
            leaves[name].requires_grad_()
        out, lse = sequence_parallel_attention(q, k, v, shard)
        torch.autograd.backward([out, lse], [local["dout"], local["dlse"]])
        for name, leaf in leaves.items():
            if name in wanted:
                torch.testing.assert_close(leaf.grad, expected["d" + name], rtol=1e-11, atol=1e-13)
            else:
                assert leaf.grad is None
    # Without any gradient wanted nothing is kept.
    with torch.no_grad():
        out, lse = sequence_parallel_attention(q, k, v, shard)
    assert not out.requires_grad and not lse.requires_grad
    # Ranks may use different results in their losses: lse alone here, out alone there.
    q, k, v = (local[name].clone().requires_grad_() for name in ("q", "k", "v"))
    out, lse = sequence_parallel_attention(q, k, v, shard)
    (lse if rank == 0 else out).square().sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


def test_gradients_only_where_wanted_and_any_strides() -> None:
    run_distributed(2, _check_partial_gradients)


def test_autocast_changes_nothing() -> None:
    for case in (Case(), Case(softcap=2.0, sinks=True)):  # the native tile, and matrix products
        expected = over_ranks(case, torch.float32, None)
        with torch.autocast("cpu", torch.bfloat16):
            results = over_ranks(case, torch.float32, None)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def _given() -> dict[str, object]:
    q, k, v = torch.randn(1, 9, 4, 8), torch.randn(1, 9, 2, 8), torch.randn(1, 9, 2, 6)
    return {"q": q, "k": k, "v": v, "shard": SequenceShard(9)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"q": torch.randn(9, 4, 8)}, r"q: .*\[B, T_w, H, K\]"),
        ({"k": torch.randn(1, 9, 2, 8, 1)}, r"k: .*\[B, S_w, G, K\]"),
        ({"q": torch.ones(1, 9, 4, 8, dtype=torch.int64)}, "q: got dtype torch.int64"),
        ({"q": torch.randn(1, 8, 4, 8)}, "q: got 8 tokens .* shard.local_length = 9"),
        ({"k": torch.randn(1, 8, 2, 8), "v": torch.randn(1, 8, 2, 6)}, "k: got 8 tokens .* shard.local_length = 9"),
        ({"v": torch.randn(1, 8, 2, 6)}, "v: got shape"),
        ({"k": torch.randn(1, 9, 3, 8), "v": torch.randn(1, 9, 3, 6)}, "k: got 3 heads, expected a divisor of q's 4"),
        ({"k": torch.randn(1, 9, 2, 7)}, "k: got shape"),
        ({"k": torch.randn(1, 9, 2, 8, dtype=torch.float64)}, "k: got dtype torch.float64, expected that of q"),
        ({"v": torch.randn(1, 9, 2, 6, device="meta")}, "v: got device meta"),
        ({"sinks": torch.zeros(3)}, "sinks: got shape"),
        ({"shard": None}, "shard: got NoneType"),
        ({"shard": SequenceShard.pretend(27, rank=1, world=3)}, "shard: .* group=group"),
        ({"key_shard": SequenceShard.pretend(27, rank=1, world=3)}, "key_shard: .* same group"),
        ({"key_shard": 9}, "key_shard: got int"),
        ({"key_shard": SequenceShard(9, cu_seqlens=[0, 4, 9])}, "key_shard: got 2 documents, expected 1"),
        ({"key_shard": SequenceShard(10)}, "k: got 9 tokens .* key_shard.local_length = 10"),
        ({"causal": 1}, "causal: got 1"),
        ({"window": (-1, 0)}, "window: got"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"softcap": 0.0}, "softcap: got 0.0"),
        ({"strategy": "allgather"}, "strategy: got 'allgather', .* what works is 'ring', also as 'auto'"),
        ({"strategy": "ulysses"}, "strategy: got 'ulysses'"),
        ({"strategy": "mesh"}, "strategy: got 'mesh'"),
        ({"strategy": "rings"}, "strategy: got 'rings', which does not exist"),
        ({"ulysses_degree": 2}, "ulysses_degree: got 2"),
        ({"backend": "triton"}, "backend: got 'triton'"),
    ],
)
def test_what_cannot_work_is_refused(changes: dict[str, object], named: str) -> None:
    arguments = _given() | changes
    q, k, v, shard = (arguments.pop(name) for name in ("q", "k", "v", "shard"))
    with pytest.raises(ValueError, match=named):
        sequence_parallel_attention(q, k, v, shard, **arguments)  # pyright: ignore[reportArgumentType] that is the test


def test_packed_documents_need_one_row() -> None:
    q = torch.randn(2, 9, 4, 8)
    with pytest.raises(ValueError, match="2 packed documents with 2 batch rows"):
        sequence_parallel_attention(q, q, q, SequenceShard(9, cu_seqlens=[0, 4, 9]))
