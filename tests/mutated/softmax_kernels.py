"""Mutations of softmax attention's Triton kernels, found by tests in Triton's interpreter, and of its chunks."""

from tests.mutated.mutation import Mutation

FORWARD, BACKWARD, COMMON = (
    f"kernels/softmax_attention/triton_{part}.py" for part in ("forward", "backward", "common")
)
TESTS = "tests/kernels/interpreted/test_softmax_attention.py::test_"
REFERENCE = (f"{TESTS}kernels_are_the_reference",)
REACH = (f"{TESTS}nan_stays_with_those_who_see_it",)
MERGED = (f"{TESTS}sets_of_keys_merge_into_one_call",)
CHUNKED = "kernels/softmax_attention/chunked.py"
CHUNKS = ("tests/kernels/test_softmax_attention.py::test_torch_and_chunked_are_the_reference",)
CHUNK_EDGES = "tests/kernels/test_softmax_attention_edges.py::test_"
SKIPPED = ("tests/kernels/test_chunked_memory.py::test_keys_that_no_query_of_a_chunk_sees_are_skipped",)

MUTATIONS = (
    Mutation(
        "softmax-triton-mask-dropped",
        FORWARD,
        "(lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])",
        "(key >= 0)[None, :] & (lo >= 0)[:, None]",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-lower-end-dropped",
        FORWARD,
        "(lo[:, None] <= key[None, :]) & (key[None, :] < hi[:, None])",
        "key[None, :] < hi[:, None]",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-sum-not-shrunk", FORWARD, "total = total * shrink + tl.sum", "total = total + tl.sum", REFERENCE
    ),
    Mutation("softmax-triton-acc-not-shrunk", FORWARD, "acc * shrink[:, None]", "acc", REFERENCE),
    Mutation(
        "softmax-triton-lse-in-base-two",
        FORWARD,
        "tl.where(sees, total, 1.0))) * LN2",
        "tl.where(sees, total, 1.0)))",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-earlier-keys-forgotten",
        FORWARD,
        'total = tl.where(largest == float("-inf"), 0.0, 1.0)',
        "total = tl.zeros([BLOCK_M], tl.float32)",
        MERGED,
    ),
    Mutation(
        "softmax-triton-nan-under-the-mask",
        FORWARD,
        "            v, bad = finite_part(v)\n",
        "            _, bad = finite_part(v)\n",
        REACH,
    ),
    Mutation("softmax-triton-delta-dropped", BACKWARD, "p * (dp - delta[:, None])", "p * dp", REFERENCE),
    Mutation("softmax-triton-delta-dropped-for-keys", BACKWARD, "p * (dp - delta[None, :])", "p * dp", REFERENCE),
    Mutation(
        "softmax-triton-lse-gradient-dropped",
        BACKWARD,
        "        delta -= tl.load(dlse_ptr",
        "        delta -= 0.0 * tl.load(dlse_ptr",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-slope-of-the-softcap",
        BACKWARD,
        "slope = 1.0 - tanh * tanh",
        "slope = 1.0 + 0.0 * tanh",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-one-query-head-of-a-group",
        BACKWARD,
        "wide, member = tl.cast(start, tl.int64), tl.cast(index // count, tl.int64)",
        "wide, member = tl.cast(start, tl.int64), tl.cast(index * 0, tl.int64)",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-mask-of-the-keys-dropped",
        BACKWARD,
        "(first[:, None] <= query[None, :]) & (query[None, :] < stop[:, None])",
        "(query >= 0)[None, :] & (first >= 0)[:, None]",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-tail-of-what-is-seen-skipped",
        COMMON,
        "    tail = tl.cdiv(tl.maximum(stop_b - (first_a + head * EDGE + middle * BLOCK), 0), EDGE)\n",
        "    tail = tl.maximum(stop_b - (first_a + head * EDGE + middle * BLOCK), 0) // EDGE\n",
        REFERENCE,
    ),
    Mutation(
        "softmax-triton-middle-too-long",
        COMMON,
        "middle = tl.maximum(stop_a - (first_a + head * EDGE), 0) // BLOCK",
        "middle = tl.cdiv(tl.maximum(stop_a - (first_a + head * EDGE), 0), BLOCK)",
        REFERENCE,
    ),
    Mutation("softmax-chunked-acc-not-shrunk", CHUNKED, "acc.mul_(shrink), weights", "acc, weights", CHUNKS),
    Mutation(
        "softmax-chunked-slope-of-the-softcap",
        CHUNKED,
        "square_().neg_().add_(1)",
        "square_().mul_(0).add_(1)",
        CHUNKS,
    ),
    Mutation(
        "softmax-chunked-earlier-keys-forgotten",
        CHUNKED,
        "total = (largest != -torch.inf).to(acc.dtype)",
        "total = torch.zeros_like(largest)",
        (f"{CHUNK_EDGES}sets_of_keys_merge_into_one_call",),
    ),
    Mutation(
        "softmax-chunked-nan-under-the-mask",
        CHUNKED,
        "        if self._bad_keys is not None:\n",
        "        if False:\n",
        (f"{CHUNK_EDGES}nan_stays_with_those_who_see_it",),
    ),
    Mutation(
        "softmax-chunked-unseen-keys-computed",
        CHUNKED,
        "stop = min(start + _KEYS, int(hi[last]))",
        "stop = min(start + _KEYS, int(hi[-1] + 0 * last))",
        SKIPPED,
    ),
)
