"""What chunked attention holds at its peak beside standard attention, by torch's memory tracker, and what it skips."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from longtrain.kernels.intervals import KeyIntervals, visible_keys
from longtrain.kernels.softmax_attention import attention_backward, attention_forward, chunked
from tests.kernels.dense import offsets

LENGTH, WIDTH = 16_384, 16


def peak_beyond(tracker: MemTracker, inputs: list[Tensor]) -> int:
    """Bytes of the tracker's peak without the inputs: results count."""
    (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot["Total"] - sum(x.numel() * x.element_size() for x in inputs)


def standard_attention(*, gradients: bool) -> int:
    """Peak bytes of softmax(q k^T) v by autograd, whose results the tracker knows from fake tensors alone."""
    with FakeTensorMode():
        inputs = [torch.randn(1, LENGTH, 1, WIDTH, requires_grad=gradients and i < 3) for i in range(4)]
        tracker = MemTracker()
        tracker.track_external(*inputs)
        with tracker:
            q, k, v, dout = inputs
            weights = (torch.einsum("bthk,bshk->bhts", q, k) * WIDTH**-0.5).softmax(-1)
            out = torch.einsum("bhts,bshv->bthv", weights, v)
            if gradients:
                torch.autograd.grad(out, [q, k, v], dout)
        return peak_beyond(tracker, inputs)


def causal(length: int) -> KeyIntervals:
    ends = {"query_offsets": offsets([length]), "key_offsets": offsets([length])}
    return KeyIntervals(*visible_keys(np.arange(length), causal=True, window=None, **ends), length)


def chunked_attention(length: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Peak bytes of a causal call in chunks on true tensors, before and with backward; the tracker sees every one."""
    q, k, v, dout = inputs = [torch.randn(1, length, 1, WIDTH, dtype=dtype) for _ in range(4)]
    tracker, call = MemTracker(), {"scale": WIDTH**-0.5, "softcap": None, "backend": "chunked"}
    tracker.track_external(*inputs)
    with tracker:
        out, lse = torch.zeros_like(q, dtype=torch.float32), torch.full(q.shape[:3], -torch.inf)
        attention_forward(q, k, v, causal(length), out=out, lse=lse, **call)
        inference = peak_beyond(tracker, inputs)
        into = {f"d{name}": torch.zeros_like(q, dtype=torch.float32) for name in "qkv"}
        given = {"out": out, "lse": lse, "dout": dout, "dlse": None}
        attention_backward(q, k, v, causal(length), **given, **into, **call)
    return inference, peak_beyond(tracker, inputs)


def test_standard_attention_holds_many_times_more() -> None:
    """The bars are the paper's at 16,384 tokens, of inference and of differentiation."""
    standard = [standard_attention(gradients=gradients) for gradients in (False, True)]
    ratios = [whole / part for whole, part in zip(standard, chunked_attention(LENGTH), strict=True)]
    print("standard attention holds {:.0f} x as much in inference, {:.0f} x with gradients".format(*ratios))
    assert ratios[0] >= 59 and ratios[1] >= 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_with_the_results_and_intervals_alone(dtype: torch.dtype) -> None:
    """Results, the ends of the intervals and a copy of lse: no whole input in float32 beside them."""
    lengths = (2048, 4096)
    forward, both = zip(*(chunked_attention(length, dtype) for length in lengths), strict=True)
    per_token = [(peaks[1] - peaks[0]) / (lengths[1] - lengths[0]) for peaks in (forward, both)]
    results = 4 * (WIDTH + 1)
    assert per_token == [results + 16, results + 4 * 3 * WIDTH + 16 + 4]


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_keys_that_no_query_of_a_chunk_sees_are_skipped(softcap: float | None) -> None:
    """Half a chunk of queries at one end of the keys, half at the other, a chunk that sees nothing, and a window."""
    rows = chunked._ROWS
    lo = np.repeat(np.array([0, 4000, 4010, 4100], dtype=np.int64), [rows // 2, rows // 2, rows, rows])
    hi = lo + np.repeat(np.array([10, 10, 0, 700], dtype=np.int64), [rows // 2, rows // 2, rows, rows])
    pairs = rows * (10 + 10) + rows * 700
    q, k = torch.randn(1, lo.size, 1, WIDTH), torch.randn(1, 5000, 1, WIDTH)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    call = {"scale": 0.1, "softcap": softcap, "backend": "chunked"}
    with FlopCounterMode(display=False) as forward:
        attention_forward(q, k, k, KeyIntervals(lo, hi, 5000), out=out, lse=lse, **call)
    into = {"dq": torch.zeros_like(q), "dk": torch.zeros_like(k), "dv": torch.zeros_like(k)}
    with FlopCounterMode(display=False) as backward:
        attention_backward(q, k, k, KeyIntervals(lo, hi, 5000), out=out, lse=lse, dout=q, dlse=None, **into, **call)
    assert forward.get_total_flops() == 2 * 2 * WIDTH * pairs
    assert backward.get_total_flops() == 4 * 2 * WIDTH * pairs  # of five products, the one in place is not counted
