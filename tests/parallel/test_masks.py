"""The intervals of all ranks together against the dense mask, pair by pair, for every layout and mask."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.parallel.layouts import Layout
from longtrain.parallel.shard import SequenceShard
from tests.parallel.sequences import boundaries, layouts, windows


def dense_mask(
    queries: list[int], keys: list[int], *, causal: bool, window: tuple[int | None, int | None] | None
) -> np.ndarray:
    """Which key each query sees, pair by pair, from document boundaries alone."""
    mask = np.zeros((queries[-1], keys[-1]), dtype=int)
    left, right = window or (None, None)
    for document in range(len(queries) - 1):
        query_tokens = range(queries[document], queries[document + 1])
        key_tokens = range(keys[document], keys[document + 1])
        for i in query_tokens:
            for j in key_tokens:
                # Both counted from the document's end: 0 is the last query, and the last key.
                ahead = (j - key_tokens.stop) - (i - query_tokens.stop)
                if causal and ahead > 0:
                    continue
                if left is not None and ahead < -left or right is not None and ahead > right:
                    continue
                mask[i, j] = 1
    return mask


def mask_from_intervals(
    shard: SequenceShard, keys: SequenceShard, *, causal: bool, window: tuple[int | None, int | None] | None
) -> np.ndarray:
    """How often the intervals of all (rank, source) pairs name each (query, key) pair."""
    mask = np.zeros((shard.length, keys.length), dtype=int)
    for rank in range(shard.world):
        queries = shard.as_rank(rank)
        own_keys = keys if rank == keys.rank else keys.as_rank(rank)
        for source in range(shard.world):
            seen = queries.intervals(source, key_shard=own_keys, causal=causal, window=window)
            key_positions = keys.as_rank(source).positions
            assert seen.keys == len(key_positions) and len(seen.lo) == len(seen.hi) == queries.local_length
            assert (np.diff(seen.lo) >= 0).all() and (np.diff(seen.hi) >= 0).all() and (seen.lo <= seen.hi).all()
            for query, lo, hi in zip(queries.positions.tolist(), seen.lo, seen.hi, strict=True):
                mask[query, key_positions[lo:hi]] += 1
    return mask


@settings(max_examples=150)
@given(
    data=st.data(),
    world=st.integers(1, 6),
    length=st.integers(0, 70),
    layout=layouts,
    causal=st.booleans(),
    window=windows,
)
def test_intervals_of_all_ranks_are_the_dense_mask(
    data: st.DataObject, world: int, length: int, layout: str | Layout, causal: bool, window: tuple | None
) -> None:
    documents = data.draw(boundaries(length))
    shard = SequenceShard.pretend(length, rank=0, world=world, layout=layout, cu_seqlens=documents)
    expected = dense_mask(documents, documents, causal=causal, window=window)
    np.testing.assert_array_equal(mask_from_intervals(shard, shard, causal=causal, window=window), expected)


@settings(max_examples=100)
@given(
    data=st.data(), world=st.integers(1, 5), length=st.integers(0, 50), key_length=st.integers(0, 50),
    layout=layouts, key_layout=layouts, causal=st.booleans(), window=windows,
)  # fmt: skip
def test_intervals_on_another_sequences_keys_are_the_dense_mask(
    data: st.DataObject, world: int, length: int, key_length: int, layout: str | Layout, key_layout: str | Layout,
    causal: bool, window: tuple | None,
) -> None:  # fmt: skip
    queries = data.draw(boundaries(length))
    keys = data.draw(boundaries(key_length, documents=len(queries) - 1))
    shard = SequenceShard.pretend(length, rank=0, world=world, layout=layout, cu_seqlens=queries)
    key_shard = SequenceShard.pretend(key_length, rank=0, world=world, layout=key_layout, cu_seqlens=keys)
    expected = dense_mask(queries, keys, causal=causal, window=window)
    np.testing.assert_array_equal(mask_from_intervals(shard, key_shard, causal=causal, window=window), expected)


def test_intervals_are_kept_and_areas_add_up() -> None:
    shard = SequenceShard.pretend(40, rank=1, world=3, layout="zigzag")
    assert shard.intervals(2) is shard.intervals(2, causal=True, window=None)
    assert shard.intervals(2) is not shard.intervals(2, window=(3, None))
    assert shard.intervals(2, window=(3, 0)) is shard.intervals(2, window=[3, 0])  # pyright: ignore[reportArgumentType] - lists come from recipes
    assert sum(shard.as_rank(rank).intervals(source).area for rank in range(3) for source in range(3)) == 40 * 41 // 2


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "striped:128"])
def test_a_million_tokens_on_64_ranks_cost_little_host_time(layout: str) -> None:
    """The bar is 50 ms for all sources; the limit here allows for a machine that does other things at the same time."""
    length, world = 1 << 20, 64
    sizes = np.random.default_rng(0).lognormal(np.log(2048), 1.5, size=2000).astype(np.int64)
    ends = np.cumsum(sizes)
    documents = np.concatenate([[0], ends[ends < length], [length]])

    def seconds() -> float:
        start = time.perf_counter()
        shard = SequenceShard.pretend(length, rank=37, world=world, layout=layout, cu_seqlens=documents)
        for source in range(world):
            shard.intervals(source)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.15
