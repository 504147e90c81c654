"""Shards against plain Python: what a rank holds, its segments, its groups, and what is refused."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from longtrain.parallel.layouts import Layout
from longtrain.parallel.mesh import build_mesh
from longtrain.parallel.shard import SequenceShard
from tests.distributed import run_distributed
from tests.parallel.sequences import RandomAssignment, boundaries, layouts


@given(data=st.data(), world=st.integers(1, 6), length=st.integers(0, 70), layout=layouts)
def test_ranks_share_out_the_positions_and_their_segments(
    data: st.DataObject, world: int, length: int, layout: str | Layout
) -> None:
    documents = data.draw(boundaries(length))
    starts = {p: start for start, stop in zip(documents[:-1], documents[1:], strict=True) for p in range(start, stop)}
    ends = {p: stop for start, stop in zip(documents[:-1], documents[1:], strict=True) for p in range(start, stop)}
    shard = SequenceShard.pretend(length, rank=0, world=world, layout=layout, cu_seqlens=documents)
    everything = []
    for rank in range(world):
        view = shard.as_rank(rank)
        positions = view.positions.tolist()
        assert positions == sorted(positions) and len(positions) == view.local_length == shard.lengths[rank]
        assert view.document_positions.tolist() == [p - starts[p] for p in positions]
        everything += positions
        # Segments, one token at a time: a token goes on where its neighbour in position and document is just before.
        continues = [i > 0 and p - 1 == positions[i - 1] and p != starts[p] for i, p in enumerate(positions)]
        begins = [i for i, goes_on in enumerate(continues) if not goes_on]
        assert [segment.start for segment in view.segments] == begins
        assert [segment.stop for segment in view.segments] == [*begins[1:], len(positions)][: len(begins)]
        for start, stop, first, last in view.segments:
            assert first == (positions[start] == starts[positions[start]])
            assert last == (positions[stop - 1] + 1 == ends[positions[start]])
    assert sorted(everything) == list(range(length))


def test_long_segments_stay_long() -> None:
    assert len(SequenceShard.pretend(1000, rank=1, world=4, layout="contiguous").segments) == 1
    assert len(SequenceShard.pretend(1000, rank=1, world=4, layout="zigzag").segments) == 2
    assert len(SequenceShard.pretend(1000, rank=3, world=4, layout="zigzag").segments) == 1  # its chunks are neighbours


def test_a_shard_tells_what_it_is_and_stays_it() -> None:
    shard = SequenceShard.pretend(4096, rank=1, world=2, layout="zigzag", cu_seqlens=[0, 7, 7, 4096])
    assert repr(shard) == (
        "SequenceShard(rank 1 of 2, pretended, zigzag: 2048 of 4096 tokens in 3 documents, "
        "positions 1024..2047 + 2048..3071)"
    )
    assert "positions none" in repr(SequenceShard.pretend(1, rank=0, world=2))
    assert "+ ..." in repr(SequenceShard.pretend(100, rank=0, world=2, layout="striped"))
    with pytest.raises(AttributeError, match="make another one"):
        shard.length = 5
    with pytest.raises(ValueError, match="read-only"):
        shard.cu_seqlens[1] = 6


def test_with_layout_keeps_the_documents_and_one_shard_per_layout() -> None:
    shard = SequenceShard.pretend(50, rank=2, world=3, layout="striped", cu_seqlens=[0, 20, 50])
    home = shard.with_layout("zigzag")
    assert home is shard.with_layout("zigzag") and shard.with_layout("striped:1") is shard
    assert (home.length, home.rank, home.world, home.layout.name) == (50, 2, 3, "zigzag")
    assert home.cu_seqlens.tolist() == [0, 20, 50]
    own = RandomAssignment(3)
    assert shard.with_layout(own) is shard.with_layout(own) and shard.with_layout(RandomAssignment(4)).layout is not own


def test_boundaries_come_as_list_array_or_tensor() -> None:
    for given_boundaries in (
        [0, 3, 9], (0, 3, 9), np.array([0, 3, 9]), np.array([0, 3, 9], np.int32),
        torch.tensor([0, 3, 9]), torch.tensor([0, 3, 9], dtype=torch.int32),
    ):  # fmt: skip
        offsets = SequenceShard(9, cu_seqlens=given_boundaries).cu_seqlens
        assert offsets.dtype == np.int64 and offsets.tolist() == [0, 3, 9]
    own = np.array([0, 3, 9])
    shard = SequenceShard(9, cu_seqlens=own)
    own[1] = 5
    assert shard.cu_seqlens.tolist() == [0, 3, 9]
    assert SequenceShard(9).cu_seqlens.tolist() == [0, 9]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"length": -1}, "length: got -1"),
        ({"length": 2.5}, "length: got 2.5"),
        ({"length": True}, "length: got True"),
        ({"layout": "zigzog"}, "did you mean 'zigzag'"),
        ({"group": "sequence"}, "group: got 'sequence'"),
        ({"group": 3}, "group: got 3"),
        ({"cu_seqlens": [0, 5]}, "from 0 to 9"),
        ({"cu_seqlens": [1, 9]}, "from 0 to 9"),
        ({"cu_seqlens": [0, 6, 3, 9]}, "never decrease"),
        ({"cu_seqlens": [0.0, 9.0]}, "dtype float64"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int16)}, "dtype torch.int16"),
        ({"cu_seqlens": [[0, 9]]}, "shape"),
        ({"cu_seqlens": []}, "cu_seqlens: got"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SequenceShard(**{"length": 9, **arguments})


class Greedy(Layout):
    """Every rank holds everything: no layout."""

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.array([[0, length]])


def test_a_layout_that_is_no_partition_makes_no_shard() -> None:
    assert SequenceShard(5, layout=Greedy()).local_length == 5
    with pytest.raises(ValueError, match="position 0 belongs to rank 0 too"):
        SequenceShard.pretend(5, rank=0, world=2, layout=Greedy())
    with pytest.raises(ValueError, match="position 0 belongs to rank 0 too"):
        SequenceShard.pretend(5, rank=0, world=2).with_layout(Greedy())


def test_bad_calls_are_refused() -> None:
    shard = SequenceShard.pretend(10, rank=1, world=2)
    x = torch.zeros(1, 10, 3)
    with pytest.raises(ValueError, match=r"expected 10 tokens in dim 2"):
        shard.split(x, dim=2)
    with pytest.raises(ValueError, match="dim: got 3"):
        shard.split(x, dim=3)
    with pytest.raises(ValueError, match="expected 5 tokens in dim 1"):
        shard.gather(x, dim=1)
    with pytest.raises(ValueError, match="no group to send in"):
        shard.gather(x[:, :5], dim=1)
    with pytest.raises(ValueError, match="no group to send in"):
        shard.relayout(x[:, :5], shard.with_layout("zigzag"), dim=1)
    with pytest.raises(ValueError, match="expected 10 as in this shard"):
        shard.relayout(x[:, :5], SequenceShard.pretend(12, rank=1, world=2), dim=1)
    with pytest.raises(ValueError, match="other: got .* same group"):
        shard.relayout(x[:, :5], SequenceShard.pretend(10, rank=1, world=3), dim=1)
    with pytest.raises(ValueError, match="source: got 2"):
        shard.intervals(2)
    with pytest.raises(ValueError, match="window: got"):
        shard.intervals(0, window=(-1, 0))
    with pytest.raises(ValueError, match="key_shard: got 2 documents, expected 1"):
        shard.intervals(0, key_shard=SequenceShard.pretend(10, rank=1, world=2, cu_seqlens=[0, 4, 10]))
    with pytest.raises(ValueError, match="key_shard: .* same group"):
        shard.intervals(0, key_shard=SequenceShard.pretend(10, rank=1, world=3))
    with pytest.raises(ValueError, match="rank: got 5"):
        shard.as_rank(5)
    with pytest.raises(ValueError, match="rank: got 2 of world 2"):
        SequenceShard.pretend(10, rank=2, world=2)


def check_groups(rank: int, world: int) -> list[str]:
    told = []

    def refused(function, *args, **kwargs) -> None:
        with pytest.raises(ValueError) as refusal:
            function(*args, **kwargs)
        told.append(str(refusal.value))

    alone = SequenceShard(8)  # None is this process alone, also in a distributed run
    assert (alone.rank, alone.world, alone.local_length) == (0, 1, 8)
    pair = dist.new_group([0, 2])
    if rank == 1:
        refused(SequenceShard, 8, group=pair)
    mesh = build_mesh("cpu", data=2, sequence=2)
    shard = SequenceShard(9, mesh["sequence"])
    assert shard.rank == rank % 2 and shard.world == 2
    assert dist.get_process_group_ranks(shard.group) == [rank - rank % 2, rank - rank % 2 + 1]
    x = torch.arange(9) + 100 * (rank // 2)
    assert torch.equal(shard.gather(shard.split(x, 0), 0), x)
    refused(SequenceShard, 9, mesh)
    refused(shard.relayout, shard.split(x, 0), SequenceShard(9, mesh["data"]), dim=0)
    refused(shard.intervals, 0, key_shard=SequenceShard(9, mesh["data"]))
    refused(build_mesh, "cpu", data=2, sequence=3)
    refused(build_mesh, "cpu", data=0, sequence=4)
    return told


def test_meshes_and_groups() -> None:
    results = run_distributed(4, check_groups)
    assert "not a member" in results[1][0]
    for told in (results[0], results[1][1:], results[2], results[3]):
        assert "expected one, such as mesh['sequence']" in told[0]
        assert "same group" in told[1] and "same group" in told[2]
        assert "2 x 3 = 6 ranks for 4 processes" in told[3] and "2 x 2" in told[3]
        assert "data: got 0" in told[4]
