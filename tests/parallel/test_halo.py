"""Who takes which tokens of whom for its halos, by brute force."""

import numpy as np
import pytest

from longtrain.parallel import SequenceShard
from longtrain.parallel.halo import halo_plan


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("documents", [None, (0, 3, 3, 11, 24, 25, 31)])
def test_the_plan_takes_every_token_from_its_holder(layout: str, documents: tuple[int, ...] | None) -> None:
    starts = np.array(documents or (0, 31))
    for world in (1, 2, 3, 5, 40):
        shards = [
            SequenceShard.pretend(31, rank=rank, world=world, layout=layout, cu_seqlens=documents)
            for rank in range(world)
        ]
        for reach in (0, 1, 3, 9):
            plans = [halo_plan(shard, reach) for shard in shards]
            assert all(halo_plan(shard, reach) is plan for shard, plan in zip(shards, plans, strict=True))
            sent = [piece for plan in plans for piece in plan.sends]
            assert sorted(sent, key=str) == sorted((piece for plan in plans for piece in plan.receives), key=str)
            for shard, plan in zip(shards, plans, strict=True):
                halo = np.full((len(plan.slots), reach), -1)
                for piece in plan.receives:
                    tokens = shards[piece.source].positions[piece.start : piece.start + piece.count]
                    halo[piece.entry, piece.row : piece.row + piece.count] = tokens
                expected = []
                for first in (shard.segments[plan.scan.first[slot]].start for slot in range(len(plan.scan.first))):
                    own = int(shard.positions[first])
                    document = starts[np.searchsorted(starts, own, side="right") - 1]
                    before = np.arange(own - reach, own)
                    if own > document and reach:
                        expected.append(np.where(before >= document, before, -1).tolist())
                assert halo.tolist() == expected
                assert list(plan.counts) == [sum(p >= 0 for p in row) for row in expected]
