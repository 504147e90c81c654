"""Key intervals against dense masks written pair by pair."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrain.kernels.intervals import KeyIntervals, visible_keys
from tests.kernels.dense import offsets, sees

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=5)
reaches = st.none() | st.integers(0, 6) | st.just(1 << 63)
windows = st.none() | st.tuples(reaches, reaches)


@given(data=st.data(), queries=lengths, same=st.booleans(), causal=st.booleans(), window=windows)
def test_visible_keys_are_the_dense_mask(data, queries, same, causal, window):
    keys = queries if same else data.draw(st.lists(st.integers(0, 9), min_size=len(queries), max_size=len(queries)))
    limits: dict[str, Any] = {"causal": causal, "window": window}
    limits |= {"query_offsets": offsets(queries), "key_offsets": offsets(keys)}
    held = data.draw(st.lists(st.booleans(), min_size=sum(queries), max_size=sum(queries)))
    positions = np.flatnonzero(np.array(held, dtype=bool)).astype(np.int64)
    first, stop = visible_keys(positions, **limits)
    assert first.dtype == stop.dtype == np.int64
    key = np.arange(sum(keys))
    for i, position in enumerate(positions.tolist()):
        assert [first[i] <= j < stop[i] for j in key] == [sees(position, j, **limits) for j in key.tolist()]
    # On any sorted set of keys the counts before both ends are intervals that never decrease: no error here.
    kept = np.flatnonzero(
        np.array(data.draw(st.lists(st.booleans(), min_size=key.size, max_size=key.size)), dtype=bool)
    )
    before = np.searchsorted(kept, np.arange(key.size + 1)).astype(np.int64)
    intervals = KeyIntervals(before[first], before[stop], kept.size)
    dense = np.array([[sees(i, j, **limits) for j in kept.tolist()] for i in positions.tolist()], dtype=bool)
    dense = dense.reshape(positions.size, kept.size)
    assert intervals.area == dense.sum()
    assert (covered(intervals) == dense).all()


def covered(intervals: KeyIntervals) -> np.ndarray:
    """How often each pair lies in a tile, [T, S]; checks each tile's own promise on the way."""
    count = np.zeros((intervals.lo.size, intervals.keys), dtype=np.uint8)
    for whole in intervals.tiles:
        for tile in (whole, *whole.cut(5, 7)):
            shape = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
            assert min(shape) > 0 and (tile is whole or (shape[0] <= 5 and shape[1] <= 7))
            visible = intervals.visible(tile)
            assert visible.shape == shape
            if tile.kind != "masked":
                assert tile.kind == "full" or shape[0] == shape[1]
                expected = np.ones(shape, bool) if tile.kind == "full" else np.tri(*shape, dtype=bool)
                assert (visible == expected).all()
            if tile is not whole:
                count[tile.rows, tile.keys] += visible
    return count


@given(
    steps=st.lists(
        st.tuples(st.sampled_from([0, 1, 1, 1, 2, 20]), st.integers(0, 1), st.integers(1, 100)), min_size=1, max_size=5
    ),
    spread=st.sampled_from([0, 3, 70, 900]),
    seed=st.integers(0, 9),
)
def test_tiles_and_queries_cover_every_visible_pair_once(steps, spread, seed):
    # Pieces of queries whose hi grows by a step, some with lo held still, some with lo anywhere below.
    growth = np.concatenate([np.full(count, step) for step, _, count in steps])
    hi = np.cumsum(growth).astype(np.int64)
    moving = np.concatenate([np.full(count, move) for _, move, count in steps])
    back = np.random.default_rng(seed).integers(0, spread + 1, hi.size)
    lo = np.maximum.accumulate(np.where(moving, hi - back, 0).clip(0)).astype(np.int64)
    intervals = KeyIntervals(np.minimum(lo, hi), hi, int(hi[-1]) + 3)
    key = np.arange(intervals.keys)
    dense = (intervals.lo[:, None] <= key) & (key < intervals.hi[:, None])
    assert (covered(intervals) == dense).all()
    assert intervals.area == dense.sum()
    first, stop = intervals.queries()
    query = np.arange(hi.size)
    assert (first <= stop).all()
    assert (((first[:, None] <= query) & (query < stop[:, None])) == dense.T).all()


QUERY = np.arange(128, dtype=np.int64)
CONSTANT = np.zeros_like(QUERY)


@pytest.mark.parametrize(
    ("lo", "hi"),
    [(CONSTANT, QUERY + ahead) for ahead in range(5)]
    + [(QUERY // 20, 900 + (QUERY >= late)) for late in (1, 126, 127)]
    + [(CONSTANT + (QUERY >= late), 900 + QUERY // 20) for late in (1, 126, 127)],
)
def test_tiles_of_few_keys_are_not_lost(lo, hi):
    """Diagonals that begin with 0, 1, 2 ... keys, and edges one key wide of a block that sees 900 keys."""
    intervals = KeyIntervals(lo, hi, int(hi[-1]))
    key = np.arange(intervals.keys)
    assert (covered(intervals) == ((lo[:, None] <= key) & (key < hi[:, None]))).all()


@pytest.mark.parametrize(("length", "tiles"), [(200, 1), (256, 1), (257, 3), (1000, 7)])
def test_a_causal_document_is_a_few_tiles(length, tiles):
    ends = np.arange(length, dtype=np.int64)
    intervals = KeyIntervals(np.zeros_like(ends), ends + 1, length)
    assert len(intervals.tiles) == tiles and {tile.kind for tile in intervals.tiles} <= {"diagonal", "full"}
    assert all(tile.rows.stop - tile.rows.start <= 256 for tile in intervals.tiles if tile.kind == "diagonal")
    assert (covered(intervals) == np.tri(length, dtype=bool)).all()
    assert intervals.tiles is intervals.tiles  # searched once


@pytest.mark.parametrize("documents", [[1] * 2000, [16] * 250, [100, 1900, 2000], [4000]])
@pytest.mark.parametrize("window", [None, (3, 0), (600, 0)])
@pytest.mark.parametrize("extra", [0, 700])
def test_tiles_hold_little_that_is_invisible(documents, window, extra):
    boundaries, keys = offsets(documents), offsets([length + extra for length in documents])
    first, stop = visible_keys(
        np.arange(boundaries[-1]), causal=True, window=window, query_offsets=boundaries, key_offsets=keys
    )
    intervals = KeyIntervals(first, stop, int(keys[-1]))
    pairs = sum((t.rows.stop - t.rows.start) * (t.keys.stop - t.keys.start) for t in intervals.tiles)
    # At most twice the visible pairs, or as many as a call costs anyway; and few calls.
    assert pairs <= 2 * intervals.area + 4096 * len(intervals.tiles)
    assert len(intervals.tiles) <= 2 * len(documents) + 3 * boundaries[-1] / 64


@pytest.mark.parametrize(
    ("lo", "hi", "keys", "message"),
    [
        (np.array([0, 1]), np.array([2, 1]), 2, "lo, hi: expected ends that never decrease"),
        (np.array([1, 0]), np.array([2, 2]), 2, "lo, hi: expected ends that never decrease"),
        (np.array([0, 2]), np.array([1, 1]), 2, "lo, hi: expected 0 <= lo <= hi <= 2"),
        (np.array([-1]), np.array([1]), 2, "lo, hi: expected 0 <= lo <= hi <= 2"),
        (np.array([0]), np.array([3]), 2, "lo, hi: expected 0 <= lo <= hi <= 2"),
        (np.array([0, 0]), np.array([1]), 2, "hi: got 1 queries, expected as many as in lo, 2"),
        (np.array([0], dtype=np.int32), np.array([1]), 2, "lo: got array"),
        (np.array([0]), np.array([[1]]), 2, "hi: got array"),
        (np.array([0]), [1], 2, "hi: got [1]"),
    ],
)
def test_refuses_what_are_no_intervals(lo, hi, keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KeyIntervals(lo, hi, keys)
