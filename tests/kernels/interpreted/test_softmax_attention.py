"""The kernels of softmax attention, interpreted, against the float64 reference."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.kernels import softmax_attention
from longtrain.kernels.intervals import KeyIntervals
from longtrain.kernels.launching import Config
from longtrain.kernels.softmax_attention import attention_backward, attention_forward, configs, triton_impl
from longtrain.parallel import SequenceShard, sequence_parallel_attention
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.dense import dense_mask, offsets
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)
from tests.kernels.test_softmax_attention import AXES, errors, possible, problem
from tests.kernels.test_softmax_attention_edges import GROUPS, HEADS, LAYOUTS, key_sets, setup, solve

CASES = {
    "limits": [(True, None), (True, (7, None)), (False, (3, 5)), (False, (None, 0))],
    "documents": [
        ([70], [70]),
        ([20], [67]),
        ([0, 9, 0, 31, 27, 0], [0, 9, 0, 31, 27, 0]),
        ([12, 0, 20, 35, 5], [40, 7, 11, 35, 0]),
    ],
    "shape": [(1, 2, 2, 8, 8), (1, 4, 2, 5, 20), (2, 2, 1, 20, 5)],  # B, H, G, K, V
    "scores": [{}, {"scale": 0.9}, {"scale": -0.4}, {"scale": 0.0}, {"softcap": 1.5}],
    "loss": AXES["loss"],
}


def use_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: int, others: int, edge: int, *, descriptors: bool = False
) -> None:
    """Blocks of `rows` that see blocks of `others`; on the edge of what is visible, of `edge`.

    descriptors: loaded by tensor descriptors where they can be.
    """

    def config(kernel: str, **_: Any) -> Config:
        queries, keys = (others, rows) if kernel == "dkdv" else (rows, others)
        sizes = {"BLOCK_M": queries, "BLOCK_N": keys, "EDGE": edge, "DESCRIPTORS": descriptors}
        return Config({"BLOCK_M": 64} if kernel == "prepare" else sizes, num_warps=4, num_stages=1)

    monkeypatch.setattr(configs, "config", config)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that all stretches of blocks occur in short sequences."""
    use_blocks(monkeypatch, 16, 32, 16)


@pytest.fixture
def middle_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_blocks(monkeypatch, 64, 32, 32)


def check(this: Any) -> None:
    true = this.solve(torch.float64, "reference")
    allowed = errors(this.solve(torch.float32, "reference"), true)
    for name, error in errors(this.solve(torch.float32, "triton"), true).items():
        assert error <= max(4 * allowed[name], 5e-6), (name, error, allowed[name])


@cover(CASES, lambda case: possible({"tiles": ""} | case))
def test_kernels_are_the_reference(case, small_blocks):
    check(problem(**case))


@pytest.mark.parametrize("limits", [(True, None), (False, None), (True, (50, 0))])
def test_shipped_blocks(limits):
    check(problem(limits, ([200], [200]), (1, 2, 1, 20, 40)))


def test_halves_are_computed_in_float32():
    this = problem(documents=([60], [60]))
    this.inputs = {name: x.half() for name, x in this.inputs.items()}
    true, got = this.solve(torch.float64, "reference"), this.solve(torch.float16, "triton")
    assert {name for name, x in got.items() if x.dtype != torch.float16} == {"lse"}
    assert max(errors(got, true).values()) <= 4 * torch.finfo(torch.float16).eps


@cover(
    {
        "offender": ["q", "k", "v", "dout", "dlse"],
        "value": [torch.nan, torch.inf, -torch.inf],
        "layout": list(LAYOUTS),
        "place": [0.0, 0.3, 0.99],  # of the offending token, as a part of the sequence
    },
    # Several rows take the interpreter long.
    lambda case: case["layout"] != "rows" or (case["offender"] in ("v", "dout") and case["value"] is torch.nan),
)
def test_nan_stays_with_those_who_see_it(case, middle_blocks):
    tensors, options, mask = setup(case["layout"])
    tensors = {name: x.float() for name, x in tensors.items()}
    offender = case["offender"]
    clean = solve(tensors, options, "triton")
    victim = tensors[offender] = tensors[offender].clone()
    row, head, token = victim.shape[0] - 1, 1, int(case["place"] * victim.shape[1])
    victim[(row, token, head, *[2] * (victim.ndim - 3))] = case["value"]
    dirty = solve(tensors, options, "triton")
    bad = torch.zeros(clean["lse"].shape, dtype=torch.bool)
    if offender in ("k", "v"):
        share = HEADS // GROUPS
        bad[row, torch.from_numpy(mask[:, token]), head * share : (head + 1) * share] = True
    else:
        bad[row, token, head] = bool(mask[token].any())
    bad_keys = torch.einsum("bthr,ts->bshr", bad.unflatten(2, (GROUPS, -1)).double(), torch.from_numpy(mask).double())
    bad_keys = bad_keys.sum(3) > 0
    forward = bad if offender in "qkv" else torch.zeros_like(bad)
    for name, where in {"out": forward, "lse": forward, "dq": bad, "dk": bad_keys, "dv": bad_keys}.items():
        assert torch.equal(dirty[name][~where], clean[name][~where]), name
    if case["value"] is torch.nan:
        assert not dirty["out"].isfinite().all(-1)[forward].any()
        assert not dirty["dq"].isfinite().all(-1)[bad].any()
        assert not dirty["dk"].isfinite().all(-1)[bad_keys].any()


def described(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch that could use descriptors does, as they come."""
    found, real = [], triton_impl._described

    def watched(*args: Any) -> Any:
        config, blocks = real(*args)
        found.append(config.constants["DESCRIPTORS"])
        assert (None not in blocks) == found[-1]
        return config, blocks

    monkeypatch.setattr(triton_impl, "_described", watched)
    return found


@pytest.mark.parametrize("limits", [{}, {"causal": False, "window": (40, 35)}])
@pytest.mark.parametrize("bad", [None, "k", "dout"])
def test_descriptors_change_nothing(limits, bad, monkeypatch):
    torch.manual_seed(0)
    # Rows of a multiple of 16 bytes, as the accelerator wants them, and no multiple of a block in number.
    sizes = {"q": (4, 8), "k": (2, 8), "v": (2, 12), "dout": (4, 12), "dlse": (4,)}
    tensors = {name: torch.randn(2 if limits else 1, 75, *size) for name, size in sizes.items()}
    if bad is not None:
        tensors[bad][0, 11, 1, 2] = torch.nan
    found = []
    for descriptors in (False, True):
        use_blocks(monkeypatch, 16, 16, 16, descriptors=descriptors)
        used = described(monkeypatch)
        found.append(solve(tensors, limits, "triton"))
        assert used == [descriptors] * 3  # forward, dkdv, dq
    assert all(torch.equal(x.nan_to_num(7), found[1][name].nan_to_num(7)) for name, x in found[0].items())


@pytest.mark.parametrize("place", ["address", "rows", "repeated"])
def test_what_no_descriptor_can_name_is_loaded_by_pointers(place, monkeypatch):
    use_blocks(monkeypatch, 16, 16, 16, descriptors=True)
    used = described(monkeypatch)
    q, k, v = torch.randn(1, 64, 4, 8), torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8)
    true, _ = softmax_attention(q, k, v, backend="torch")
    if place == "address":
        k = torch.zeros(k.numel() + 1)[1:].view(k.shape).copy_(k)
    elif place == "rows":
        k = torch.zeros(1, 64, 2, 9)[..., :8].copy_(k)
    else:
        k, v = (x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v))
        true, _ = softmax_attention(q, k, v, backend="torch")
    out, _ = softmax_attention(q, k, v, backend="triton")
    assert used == [False]
    torch.testing.assert_close(out, true, rtol=1e-5, atol=1e-5)


def test_queries_without_keys(middle_blocks):
    tensors, options, mask = setup("packed")
    tensors = {name: x.float() for name, x in tensors.items()}
    clean = solve(tensors, options, "triton")
    blind = torch.from_numpy(~mask.any(1))
    for name in ("q", "dout", "dlse"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, blind] = torch.nan
    dirty = solve(tensors, options, "triton")
    assert (dirty["out"][:, blind] == 0).all() and (dirty["dq"][:, blind] == 0).all()
    assert (dirty["lse"][:, blind] == -torch.inf).all()
    assert all(torch.equal(x, clean[name]) for name, x in dirty.items())
    unseen = torch.from_numpy(~mask.any(0))
    assert unseen.any() and (clean["dk"][:, unseen] == 0).all() and (clean["dv"][:, unseen] == 0).all()


@pytest.mark.parametrize(("layout", "ends"), [("rows", [70]), ("two-sided", [1, 45])])
@pytest.mark.parametrize("bad_key", [None, 20])
def test_sets_of_keys_merge_into_one_call(layout, ends, bad_key, middle_blocks):
    """As a ring does it: sets in any order, forward into running results, backward from the final ones."""
    tensors, options, mask = setup(layout)
    if bad_key is not None:
        tensors["k"][0, bad_key, 1, 0] = torch.nan
    whole = solve(tensors, options, "torch")
    q, k, v, dout, dlse = (tensors[name].float() for name in ("q", "k", "v", "dout", "dlse"))
    call: dict[str, Any] = {"scale": q.shape[3] ** -0.5, "softcap": None, "backend": "triton"}
    out, lse = torch.zeros_like(dout), torch.full_like(dlse, -torch.inf)
    sets = key_sets(mask, ends)
    for keys, intervals in reversed(sets):
        blind = torch.from_numpy(intervals.lo == intervals.hi)
        before = out[:, blind], lse[:, blind]
        attention_forward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **call)
        after = out[:, blind], lse[:, blind]
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True))
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for keys, intervals in sets:
        gradients = {"dout": dout, "dlse": dlse, "dq": dq, "dk": dk[:, keys], "dv": dv[:, keys]}
        attention_backward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **gradients, **call)
    for name, x in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items():
        torch.testing.assert_close(x.double(), whole[name], rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)


def test_repair_computes_again_what_is_not_finite(small_blocks):
    """As after a vendor's kernel, whose blocks of masked keys a NaN may have crossed."""
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 96, heads, 16) for heads in (4, 2, 2, 4))
    v[0, 50, 1, 3] = torch.nan
    lo, hi = np.zeros(96, dtype=np.int64), np.arange(1, 97, dtype=np.int64)
    intervals = KeyIntervals(lo, hi, 96)
    options: dict[str, Any] = {"scale": 0.25, "softcap": None, "accumulate": False}
    true_out, true_lse = torch.empty_like(q), torch.empty(1, 96, 4)
    triton_impl.forward(q, k, v, intervals, out=true_out, lse=true_lse, **options)
    assert true_out[:, :50].isfinite().all() and true_out[:, 50:, 2:].isnan().any(-1).all()
    out, lse = true_out.clone(), true_lse.clone()
    out[0, 32:50, 2:] = torch.nan  # leaked
    out[0, :32] = 5.0  # finite: not to be touched
    triton_impl.forward(q, k, v, intervals, out=out, lse=lse, repair=True, **options)
    assert (out[0, :32] == 5).all()
    assert torch.equal(out[0, 32:].nan_to_num(7), true_out[0, 32:].nan_to_num(7))
    given = {"out": true_out, "lse": true_lse, "dout": dout, "dlse": None}
    true = [torch.empty_like(x) for x in (q, k, v)]
    triton_impl.backward(q, k, v, intervals, **given, dq=true[0], dk=true[1], dv=true[2], **options)
    found = [x.clone() for x in true]
    found[0][0, 33, 1, 0] = torch.nan
    found[1][0, 20, 0, 0] = torch.inf
    found[2][0, 90] = torch.nan
    triton_impl.backward(q, k, v, intervals, **given, dq=found[0], dk=found[1], dv=found[2], repair=True, **options)
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(found, true, strict=True))


def test_strides_and_nothing_to_do():
    torch.manual_seed(0)
    q = torch.randn(1, 4, 6, 33).permute(0, 3, 1, 2)
    k = torch.randn(1, 33, 6, 2).transpose(2, 3)
    v = torch.randn(1, 2, 33, 12).transpose(1, 2)[..., :6]
    dout, dlse = torch.randn(1, 1, 4, 1).expand(1, 33, 4, 6), torch.randn(4, 33).t()[None]
    found = []
    for backend in ("triton", "torch"):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, lse = softmax_attention(*leaves, backend=backend)
        assert lse is not None
        found.append([out, lse, *torch.autograd.grad([out, lse], leaves, [dout, dlse])])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    for batch, queries, keys in ((1, 0, 5), (1, 5, 0), (0, 5, 5)):
        leaves = [torch.randn(batch, n, 2, 3, requires_grad=True) for n in (queries, keys, keys)]
        out, lse = softmax_attention(*leaves, backend="triton")
        assert lse is not None
        gradients = torch.autograd.grad([out, lse], leaves, [torch.randn_like(out), torch.randn_like(lse)])
        assert (out == 0).all() and (lse == -torch.inf).all() and all((x == 0).all() for x in gradients)


@pytest.mark.parametrize("strategy", ["ring", "allgather", "ulysses"])
def test_one_rank(strategy):
    torch.manual_seed(0)
    tensors = [torch.randn(1, 90, heads, 8) for heads in (4, 2, 2)]
    dout, found = torch.randn(1, 90, 4, 8), []
    ends = torch.from_numpy(offsets([30, 0, 60]))
    for backend in ("triton", "torch"):
        leaves: list[Tensor] = [x.clone().requires_grad_() for x in tensors]
        shard = SequenceShard(90, cu_seqlens=ends)
        out, lse = sequence_parallel_attention(
            leaves[0], leaves[1], leaves[2], shard, window=(20, 0), strategy=strategy, backend=backend
        )
        found.append([out, lse, *torch.autograd.grad(out, leaves, dout)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_what_a_wide_head_or_float64_gets():
    wide = torch.randn(1, 4, 1, 257)
    with pytest.raises(ValueError, match="backend: got 'triton' .*the Triton kernels take K up to 256, not 257"):
        softmax_attention(wide, wide, wide[..., :8], backend="triton")
    with pytest.raises(ValueError, match="backend: got 'triton' .*not in float64"):
        softmax_attention(wide[..., :8].double(), wide[..., :8], wide[..., :8], backend="triton")
    mask = dense_mask(causal=True, query_offsets=offsets([4]), key_offsets=offsets([4]))
    assert mask.sum() == 10
