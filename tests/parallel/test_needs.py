"""What has to travel, by pieces, is what the intervals of every query say, for random masks, layouts and documents."""

from hypothesis import given, settings
from hypothesis import strategies as st

from longtrain.parallel import SequenceShard
from longtrain.parallel.attention.needs import NOTHING, Needs, Part
from tests.parallel.sequences import boundaries, layouts, windows


@st.composite
def shard_pairs(draw: st.DrawFn) -> tuple[SequenceShard, SequenceShard]:
    world, documents = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    made = []
    for _ in range(2):
        length = draw(st.integers(0, 60))
        bounds = draw(boundaries(length, documents))
        made.append(SequenceShard.pretend(length, rank=0, world=world, layout=draw(layouts), cu_seqlens=bounds))
    return made[0], made[0] if draw(st.booleans()) else made[1]


@settings(max_examples=200)
@given(shards=shard_pairs(), causal=st.booleans(), window=windows)
def test_parts_are_those_of_the_intervals(
    shards: tuple[SequenceShard, SequenceShard], causal: bool, window: tuple[int | None, int | None] | None
) -> None:
    queries, keys = shards
    needs = Needs(queries, keys, causal=causal, window=window)
    for holder in range(queries.world):
        parts = []
        for reader in range(queries.world):
            key_shard = None if keys is queries else keys.as_rank(reader)
            intervals = queries.as_rank(reader).intervals(holder, key_shard=key_shard, causal=causal, window=window)
            seen = intervals.hi > intervals.lo
            part = Part(int(intervals.lo[seen].min()), int(intervals.hi[seen].max())) if seen.any() else NOTHING
            assert needs.part(reader, holder) == part
            parts += [part] if part.size else []
        hull = Part(min(part.start for part in parts), max(part.stop for part in parts)) if parts else NOTHING
        assert needs.hull(range(queries.world), holder) == hull
