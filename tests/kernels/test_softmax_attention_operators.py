"""The registered operators of softmax attention, what kernels are told of a mask, and whose kernel runs."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from longtrain.kernels import launching, softmax_attention
from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.softmax_attention import configs, operators
from longtrain.kernels.softmax_attention.device_intervals import ends, plain_mask
from tests.cover import cover, pytest_generate_tests  # noqa: F401
from tests.kernels.dense import dense_mask, offsets

OPTIONS: dict[str, Any] = {"causal": True, "left": 20, "right": None, "scale": 0.3, "softcap": None}


def tensors(dtype: torch.dtype = torch.float32, tokens: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((4, 8), (2, 8), (2, 5))
    return [torch.randn(1, tokens, *size, generator=generator).to(dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("backend", ["torch", "chunked", "reference"])
@pytest.mark.parametrize("packed", [True, False])
def test_opcheck(backend: str, packed: bool) -> None:
    ends_ = torch.tensor([0, 12, 12, 30]) if packed else None
    options = OPTIONS | {"backend": backend}
    for wide, dtype in ((False, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)):
        q, k, v = tensors(dtype)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        rounded = dtype == torch.bfloat16  # two runs agree, but the check's tolerance is float32's
        torch.library.opcheck(
            operators.forward,
            (q, k, v, ends_, ends_),
            options | {"wide": wide},
            test_utils=checks[:3] if rounded else checks,
        )
        out, lse = operators.forward(q, k, v, ends_, ends_, **options, wide=wide)
        assert out.dtype == (torch.float32 if wide else dtype) and lse.dtype == torch.float32
        detached = [x.detach() for x in (q, k, v, out, lse)]
        gradients = torch.randn_like(detached[3]), torch.randn_like(detached[4])
        for dlse in (gradients[1], None):
            given = (gradients[0], dlse, *detached, ends_, ends_)
            torch.library.opcheck(operators.backward, given, options, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("sinks", [True, False])
def test_compiles_as_one_graph(packed: bool, sinks: bool) -> None:
    boundaries = torch.tensor([0, 12, 30], dtype=torch.int32) if packed else None
    sink = torch.randn(4) if sinks else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = softmax_attention(q, k, v, cu_seqlens=boundaries, sinks=sink, window=(9, None))
        assert lse is not None
        return out, lse

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = []
    for call in (attend, compiled):
        leaves = tensors()
        out, lse = call(*leaves)
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
        found.append([out, lse, *torch.autograd.grad([out, lse], leaves, upstream)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_a_compiled_call_checks_its_boundaries_too() -> None:
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="cu_seqlens: got 0 ... 29, expected boundaries from 0 to 30"):
        compiled(*(x.detach() for x in tensors()), cu_seqlens=torch.tensor([0, 29]))


def test_layers_share_intervals() -> None:
    q, k, _ = tensors()
    given = {"causal": True, "left": None, "right": None}
    first, second = (operators._intervals(q, k, torch.tensor([0, 9, 30]), None, **given) for _ in range(2))
    other = operators._intervals(q, k, torch.tensor([0, 8, 30]), None, **given)
    assert first is second and first is not other


@cover(
    {
        "limits": [
            (True, None),
            (False, None),
            (True, (5, None)),
            (False, (3, 2)),
            (False, (None, 4)),
            (False, (9, 0)),
        ],
        "sizes": [(12, 12), (12, 30), (30, 12), (1, 7), (7, 1), (0, 3), (3, 0)],
    }
)
def test_numbers_tell_a_plain_mask(case) -> None:
    (causal, window), (queries, keys) = case["limits"], case["sizes"]
    both = {"query_offsets": offsets([queries]), "key_offsets": offsets([keys])}
    first, stop = visible_keys(np.arange(queries, dtype=np.int64), causal=causal, window=window, **both)
    intervals = KeyIntervals(first, stop, keys)
    seen, seeing = ends(intervals, torch.device("cpu"))
    assert seen.first is None and seeing.first is None  # no vectors: one document
    for told, rows, others, true in (
        (seen, queries, keys, (first, stop)),
        (seeing, keys, queries, intervals.queries()),
    ):
        found = [np.clip(np.arange(rows) + shift, 0, others) for shift in (told.first_shift, told.stop_shift)]
        seeing_any = true[0] < true[1]
        assert ((found[0] < found[1]) == seeing_any).all()
        assert all((a[seeing_any] == b[seeing_any]).all() for a, b in zip(found, true, strict=True))
        assert all((np.diff(x) >= 0).all() for x in found)
    mask = dense_mask(causal=causal, window=window, **both)
    full = mask.size > 0 and mask.all()
    plain = (
        "full" if full else "causal" if queries == keys > 0 and (mask == np.tril(np.ones_like(mask))).all() else None
    )
    assert plain_mask(intervals) == plain


def test_vectors_tell_packed_documents() -> None:
    boundaries = offsets([5, 0, 9, 3])
    both = {"query_offsets": boundaries, "key_offsets": boundaries}
    first, stop = visible_keys(np.arange(17, dtype=np.int64), causal=True, window=None, **both)
    intervals = KeyIntervals(first, stop, 17)
    seen, seeing = ends(intervals, torch.device("cpu"))
    for told, true in ((seen, (first, stop)), (seeing, intervals.queries())):
        assert told.first is not None and told.stop is not None and told.first.dtype == torch.int32
        assert (told.first.numpy() == true[0]).all() and (told.stop.numpy() == true[1]).all()
    assert ends(intervals, torch.device("cpu"))[0] is seen and plain_mask(intervals) is None


def test_which_vendor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    card, half = torch.device("cuda"), torch.bfloat16
    found = {}
    for name in launching.ARCHITECTURES:
        monkeypatch.setattr(launching, "architecture", lambda device, name=name: name)
        found[name] = configs.vendor(device=card, dtype=half, width=128)
    assert found == {"sm_80": "flash", "sm_90": "cudnn", "sm_100": "cudnn", "gfx942": None}
    monkeypatch.setattr(launching, "architecture", lambda device: "sm_80")
    assert configs.vendor(device=card, dtype=torch.float32, width=128) is None
    assert configs.vendor(device=card, dtype=half, width=100) is None
    assert configs.vendor(device=torch.device("cpu"), dtype=half, width=128) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert configs.vendor(device=card, dtype=half, width=128) is None
    finally:
        torch.use_deterministic_algorithms(False)
