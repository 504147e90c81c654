"""Picked keys over ranks, against the definition: queries see those of earlier chunks of their document and copy."""

from itertools import pairwise

import numpy as np
import pytest

from longtrain.layers.routing import RoutedChunks, routed_chunks
from longtrain.parallel import SequenceShard

BOUNDS = [0, 1, 9, 9, 30, 43]
COPIES = 3


def chunks_by_hand(bounds: list[int], length: int) -> list[tuple[int, int]]:
    """Where the chunks that their document goes on after begin and end, in order."""
    found = []
    for start, stop in pairwise(bounds):
        found += [(first, first + length) for first in range(start, stop, length) if first + length < stop]
    return found


def routing(rank: int, world: int, layout: str, length: int) -> RoutedChunks:
    shard = SequenceShard.pretend(BOUNDS[-1], rank=rank, world=world, layout=layout, cu_seqlens=BOUNDS)
    return routed_chunks(shard, length, COPIES)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("length", [1, 4, 5, 50])
@pytest.mark.parametrize(("world", "layout"), [(1, "zigzag"), (2, "contiguous"), (3, "zigzag"), (4, "striped")])
def test_queries_see_the_picked_keys_of_earlier_chunks_of_their_document(
    world: int, layout: str, length: int, share: float
) -> None:
    finished = chunks_by_hand(BOUNDS, length)
    picked = np.random.default_rng(5).random((len(finished), COPIES)) < share
    every = [routing(rank, world, layout, length) for rank in range(world)]
    holders = [routed.chunks.home for routed in every]
    # The keys of each rank in the order in which it holds them: (copy, position).
    held = [
        [
            (copy, position)
            for copy in range(COPIES)
            for (start, stop), chosen in zip(finished, picked[:, copy], strict=True)
            if chosen and start in home.positions.tolist()
            for position in range(start, stop)
        ]
        for home in holders
    ]
    assert sum(len(keys) for keys in held) == length * picked.sum()
    for rank, routed in enumerate(every):
        keys = routed.keys(picked)
        assert keys.lengths == tuple(len(own) for own in held)
        own = [(start, stop) for start, stop in finished if start in holders[rank].positions.tolist()]
        rows = [(row // len(own), own[row % len(own)]) for row in routed.rows(picked).array.tolist()]
        assert [(copy, j) for copy, (a, b) in rows for j in range(a, b)] == held[rank]
        assert routed.share(picked) == (len(rows), COPIES * len(own))
        queries = [(copy, position) for copy in range(COPIES) for position in holders[rank].positions.tolist()]
        assert routed.queries.local_length == len(queries)
        for source in range(world):
            seen = routed.queries.intervals(source, key_shard=keys)
            for (copy, i), lo, hi in zip(queries, seen.lo.tolist(), seen.hi.tolist(), strict=True):
                document = max(start for start in BOUNDS[:-1] if start <= i)
                first = document + (i - document) // length * length  # of the query's own chunk
                wanted = [key for key in held[source] if key[0] == copy and document <= key[1] < first]
                assert held[source][lo:hi] == wanted


def test_plans_are_made_once_for_a_shard() -> None:
    shard = SequenceShard(length=43, cu_seqlens=BOUNDS)
    assert routed_chunks(shard, 4, 2) is routed_chunks(shard, 4, 2)
    assert routed_chunks(shard, 4, 2) is not routed_chunks(shard, 4, 3)
