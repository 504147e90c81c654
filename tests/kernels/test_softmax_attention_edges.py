"""What softmax attention must not mix: NaN with those who cannot see it, queries without keys, sets of keys merged."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.kernels import softmax_attention
from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.softmax_attention import attention_backward, attention_forward, chunked, torch_impl
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.dense import dense_mask, offsets

IMPLEMENTATIONS = ["native", "products", "accelerator", "chunked", "chunked accelerator", "reference"]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch):
    """Makes an implementation run, and says by which backend; "accelerator": as where nobody can ask for NaN."""

    def choose(implementation: str) -> str:
        if implementation in ("products", "accelerator"):
            monkeypatch.setattr(torch_impl, "_is_native", lambda q, softcap: False)
        if "accelerator" in implementation:
            monkeypatch.setattr(torch_impl, "all_finite", lambda *tensors: False)
            monkeypatch.setattr(chunked, "all_finite", lambda *tensors: False)
        if "chunked" in implementation:
            monkeypatch.setattr(chunked, "_ROWS", 16)
            monkeypatch.setattr(chunked, "_KEYS", 24)
            return "chunked"
        return "reference" if implementation == "reference" else "torch"

    return choose


LAYOUTS = {
    # Packed, windowed: the first document has queries before its first key, the second keys that nobody sees between
    # others that are seen, the third no keys.
    "packed": (1, {"window": (6, 0)}, [14, 10, 4, 20], [8, 30, 0, 20]),
    "rows": (2, {}, [150], [150]),
    "two-sided": (1, {"causal": False, "window": (9, 4)}, [40, 50], [40, 50]),
}
HEADS, GROUPS = 4, 2


def setup(layout: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any], np.ndarray]:
    """Inputs and output gradients in float64, the call's options, and who sees whom, bool [T, S]."""
    batch, options, queries, keys = LAYOUTS[layout]
    ends = {"query_offsets": offsets(queries), "key_offsets": offsets(keys)}
    mask = dense_mask(causal=options.get("causal", True), window=options.get("window"), **ends)
    if len(queries) > 1:
        boundaries = {"cu_seqlens": ends["query_offsets"], "cu_seqlens_k": ends["key_offsets"]}
        options = options | {name: torch.from_numpy(x) for name, x in boundaries.items()}
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": (HEADS, 5), "k": (GROUPS, 5), "v": (GROUPS, 7), "dout": (HEADS, 7), "dlse": (HEADS,)}
    tokens = dict.fromkeys(sizes, mask.shape[0]) | {"k": mask.shape[1], "v": mask.shape[1]}
    tensors = {
        name: torch.randn(batch, tokens[name], *size, generator=generator, dtype=torch.float64)
        for name, size in sizes.items()
    }
    return tensors, options, mask


def solve(tensors: dict[str, Tensor], options: dict[str, Any], backend: str) -> dict[str, Tensor]:
    leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
    out, lse = softmax_attention(*leaves, **options, backend=backend)
    assert lse is not None
    found = torch.autograd.grad([out, lse], leaves, [tensors["dout"], tensors["dlse"]])
    return {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip("qkv", found, strict=True)}


@cover(
    {
        "offender": ["q", "k", "v", "dout", "dlse"],
        "value": [torch.nan, torch.inf, -torch.inf],
        "layout": list(LAYOUTS),
        "implementation": IMPLEMENTATIONS,
        "place": [0.0, 0.3, 0.99],  # of the offending token, as a part of the sequence
    }
)
def test_nan_stays_with_those_who_see_it(case, use):
    tensors, options, mask = setup(case["layout"])
    backend, offender = use(case["implementation"]), case["offender"]
    clean = solve(tensors, options, backend)
    victim = tensors[offender] = tensors[offender].clone()
    row, head, token = victim.shape[0] - 1, 1, int(case["place"] * victim.shape[1])
    victim[(row, token, head, *[2] * (victim.ndim - 3))] = case["value"]
    dirty = solve(tensors, options, backend)

    # Bad queries: the offender itself, or those who see it; bad keys: those that a bad query sees.
    bad = torch.zeros(clean["lse"].shape, dtype=torch.bool)
    if offender in ("k", "v"):
        share = HEADS // GROUPS
        bad[row, torch.from_numpy(mask[:, token]), head * share : (head + 1) * share] = True
    else:
        bad[row, token, head] = bool(mask[token].any())
    bad_keys = torch.einsum("bthr,ts->bshr", bad.unflatten(2, (GROUPS, -1)).double(), torch.from_numpy(mask).double())
    bad_keys = bad_keys.sum(3) > 0
    reached = {"dq": bad, "dk": bad_keys, "dv": bad_keys}
    forward = bad if offender in "qkv" else torch.zeros_like(bad)
    for name, where in ({"out": forward, "lse": forward} | reached).items():
        kept = ~where
        torch.testing.assert_close(dirty[name][kept], clean[name][kept], rtol=1e-12, atol=1e-12, msg=name)
    if case["value"] is torch.nan or backend != "reference":  # -inf may be a score of plain weight 0 to the reference
        assert not dirty["out"].isfinite().all(-1)[forward].any()
        assert not dirty["dq"].isfinite().all(-1)[bad].any()
        assert not dirty["dk"].isfinite().all(-1)[bad_keys].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_queries_without_keys(implementation, use):
    """They get 0, -inf and zero gradients, exactly, whatever stands in them."""
    tensors, options, mask = setup("packed")
    backend = use(implementation)
    clean = solve(tensors, options, backend)
    blind = torch.from_numpy(~mask.any(1))
    assert blind.sum() == 14 - 8 + 4
    for name in ("q", "dout", "dlse"):
        tensors[name] = tensors[name].clone()
        tensors[name][:, blind] = torch.nan
    dirty = solve(tensors, options, backend)
    assert (dirty["out"][:, blind] == 0).all() and (dirty["dq"][:, blind] == 0).all()
    assert (dirty["lse"][:, blind] == -torch.inf).all()
    for name, x in dirty.items():
        torch.testing.assert_close(x, clean[name], rtol=1e-12, atol=1e-12, msg=name)
    sinks = torch.tensor([0.3, -torch.inf, 2.0, torch.nan], dtype=torch.float64, requires_grad=True)
    out, _ = softmax_attention(tensors["q"], tensors["k"], tensors["v"], sinks=sinks, **options, backend=backend)
    (dsinks,) = torch.autograd.grad(out, sinks, tensors["dout"])
    assert (out[:, blind, :3] == 0).all() and dsinks[:3].isfinite().all() and dsinks[1] == 0
    # Keys that nobody sees get exactly zero gradients too.
    unseen = torch.from_numpy(~mask.any(0))
    assert unseen.any() and (clean["dk"][:, unseen] == 0).all() and (clean["dv"][:, unseen] == 0).all()


def key_sets(mask: np.ndarray, ends: list[int]) -> list[tuple[slice, KeyIntervals]]:
    """The keys cut at `ends`, each set with its own intervals, counted from the mask."""
    sets = []
    for start, stop in zip([0, *ends], [*ends, mask.shape[1]], strict=True):
        part = mask[:, start:stop]
        # A query that sees none of the set stands where its next key would be.
        positions = np.where(mask.any(1), mask.argmax(1), 0)
        lo = np.clip(np.maximum.accumulate(positions) - start, 0, stop - start)
        sets.append(
            (slice(start, stop), KeyIntervals(lo.astype(np.int64), (lo + part.sum(1)).astype(np.int64), stop - start))
        )
    return sets


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("layout", "ends"), [("rows", [1, 70]), ("rows", [149]), ("two-sided", [30, 45])])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bad_key", [None, 20, 80])
def test_sets_of_keys_merge_into_one_call(layout, ends, softcap, bad_key, implementation, use):
    """As a ring does it: sets in any order, forward into running results, backward from the final ones."""
    tensors, options, mask = setup(layout)
    backend = use(implementation)
    if bad_key is not None:
        tensors["k"][0, bad_key, 1, 0] = torch.nan
    whole = solve(tensors, options | {"softcap": softcap}, backend)
    q, k, v, dout = (tensors[name] for name in ("q", "k", "v", "dout"))
    call = {"scale": q.shape[3] ** -0.5, "softcap": softcap, "backend": backend}
    out, lse = torch.zeros_like(dout), torch.full_like(dout[..., 0], -torch.inf)
    sets = key_sets(mask, ends)
    for keys, intervals in reversed(sets):
        attention_forward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **call)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for keys, intervals in sets:
        gradients = {"dout": dout, "dlse": tensors["dlse"], "dq": dq, "dk": dk[:, keys], "dv": dv[:, keys]}
        attention_backward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **gradients, **call)
    got = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    for name, x in got.items():
        # Where the whole call has NaN so has the merged one; a NaN key's trace may stay out of sets that it is not in.
        torch.testing.assert_close(x, whole[name], rtol=1e-11, atol=1e-11, equal_nan=True, msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_visible_pair_leaves_everything_untouched(implementation, use):
    backend = use(implementation)
    x = torch.randn(1, 6, 2, 3)
    none = np.zeros(6, dtype=np.int64)
    running = {name: torch.randn(1, 6, 2, 3) for name in ("out", "dq", "dk", "dv")} | {"lse": torch.randn(1, 6, 2)}
    before = {name: value.clone() for name, value in running.items()}
    call = {"scale": 1.0, "softcap": None, "backend": backend}
    out, lse = running["out"], running["lse"]
    attention_forward(x, x, x, KeyIntervals(none, none, 6), out=out, lse=lse, **call)
    gradients = {name: running[name] for name in ("dq", "dk", "dv")}
    attention_backward(x, x, x, KeyIntervals(none, none, 6), out=out, lse=lse, dout=x, dlse=None, **gradients, **call)
    assert all(torch.equal(running[name], value) for name, value in before.items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_halves_merge_in_float32(implementation, use):
    """State is float32 whatever the inputs are: many small merges lose no more than float32 does."""
    backend = use(implementation)
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(1, 40, 2, 4).bfloat16() for _ in range(4))
    first, stop = visible_keys(
        np.arange(40), causal=True, window=None, query_offsets=offsets([40]), key_offsets=offsets([40])
    )
    mask = dense_mask(causal=True, query_offsets=offsets([40]), key_offsets=offsets([40]))
    out, lse = torch.zeros(1, 40, 2, 4), torch.full((1, 40, 2), -torch.inf)
    call = {"scale": 0.5, "softcap": None, "backend": backend}
    gradients = {name: torch.zeros(1, 40, 2, 4) for name in ("dq", "dk", "dv")}
    for keys, intervals in key_sets(mask, list(range(1, 40))):
        attention_forward(q, k[:, keys], v[:, keys], intervals, out=out, lse=lse, **call)
    attention_backward(
        q, k, v, KeyIntervals(first, stop, 40), out=out, lse=lse, dout=dout.float(), dlse=None, **gradients, **call
    )
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    true, true_lse = softmax_attention(*leaves, scale=0.5, backend="reference")
    assert true_lse is not None
    found = torch.autograd.grad(true, leaves, dout.double())
    for x, y in zip((out, lse, *gradients.values()), (true, true_lse, *found), strict=True):
        assert x.dtype == torch.float32
        assert (x - y).abs().max() <= 5e-6 * y.abs().max()


@pytest.mark.parametrize("backend", ["torch", "chunked"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_autocast_changes_nothing(softcap: float | None, backend: str) -> None:
    q, k, v = (torch.randn(1, 40, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    dout = torch.randn(1, 40, 4, 8)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out, lse = softmax_attention(q, k, v, softcap=softcap, backend=backend)
            results.append([out, lse, *torch.autograd.grad(out, (q, k, v), dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
