"""Gated slot attention's kernels, interpreted, against the float64 reference. A chunk has 16 tokens here."""

from typing import cast

import numpy as np
import pytest
import torch

from longtrain.kernels.gated_slot_attention import SlotAttentionBackward, SlotAttentionForward
from longtrain.kernels.linear_attention import configs
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.gated_slot_attention_cases import Five, assert_close_to_reference, problem
from tests.kernels.reach import assert_only_who_sees_it_is_reached, spoil
from tests.kernels.test_linear_attention import fill_empty_with_nan  # noqa: F401 (a fixture)

AXES = {
    "strength": ["slow", "mixed"],
    "heads": [(2, 1), (2, 2)],  # H, G
    "widths": [(5, 9, 7), (17, 3, 40)],  # K, V, M; a block takes 32 slots
    "documents": [[18, 18], [0, 1, 35, 0]],  # alike: rows of a batch
    "states": ["neither", "both"],
    "part": [16, 1024],  # tokens that one program walks through
}


@cover(AXES)
def test_kernels_are_the_reference(case, monkeypatch):
    case = dict(case)
    monkeypatch.setattr(configs, "SHORTEST_PART", case.pop("part"))
    documents = case["documents"]
    this = problem(**case, batch=len(documents) if len(set(documents)) == 1 else None)
    assert_close_to_reference(this, torch.float32, "triton")


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("seed", [0, 1])
def test_nan_and_inf_reach_who_sees_them(seed, monkeypatch):
    monkeypatch.setattr(configs, "SHORTEST_PART", 32)
    this = problem(heads=(2, 2), documents=[37, 40, 35], states="neither")
    places = [("q", torch.nan), ("k", torch.inf), ("v", torch.nan), ("slot", torch.nan), ("dout", torch.nan)]
    spoilt = spoil(this, [*places, ("log_decay", torch.nan)], seed=seed)
    spared = {"dlog_decay": torch.zeros(112, 2, dtype=torch.bool)}
    for name in ("k", "v", "slot"):
        spared["dlog_decay"] |= ~spoilt.inputs[name].isfinite().all(-1)[0]
    assert_only_who_sees_it_is_reached(this, spoilt, "triton", torch.float32, spared=spared)


def test_stages_are_those_of_the_torch_path(monkeypatch):
    monkeypatch.setattr(configs, "SHORTEST_PART", 16)
    this = problem(heads=(2, 1), documents=[36], batch=1)
    inputs = dict(this.inputs)
    keys, values = (torch.stack((inputs.pop(name),) * 3, 1) for name in ("keys", "values"))
    tensors = cast(Five, tuple(inputs.values()))
    offsets = np.array([0, 19, 19, 36])
    found = []
    for backend in ("triton", "torch"):
        forward = SlotAttentionForward(*tensors, offsets, scale=0.4, backend=backend)
        results = list(forward.summaries())
        forward.local()
        out, weights, final = forward.finish((keys, values))
        assert final is not None
        options = {"scale": 0.4, "backend": backend}
        backward = SlotAttentionBackward(*tensors, weights, offsets, this.gradients["out"], **options)
        results += [out, weights, *final, backward.log_transition(), backward.value_summaries()]
        backward.local_values(values)
        results += [backward.finish_values(values, 2 * values), backward.key_summaries()]
        backward.local_keys(keys)
        found.append([*results, *backward.finish(keys, 3 * keys)])
    for got, true in zip(*found, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize(("batch", "documents"), [(None, [0]), (2, [0]), (0, [5])])
def test_nothing_to_do(batch, documents):
    this = problem(documents=documents, batch=batch)
    got = this.solve(torch.float32, "triton")
    assert got["out"].shape == this.inputs["v"].shape and torch.equal(got["dkeys"], this.gradients["keys"])
