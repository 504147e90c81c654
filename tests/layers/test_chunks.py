"""Chunks of packed documents over ranks, against a list of chunks made one document at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtrain.layers.chunks import chunks_of
from longtrain.layers.long_convolution import ShortLongConvolution
from longtrain.parallel import SequenceShard

documents = st.lists(st.integers(0, 12), min_size=1, max_size=6)


@given(
    lengths=documents, length=st.integers(1, 7), world=st.integers(1, 4), layout=st.sampled_from(["zigzag", "striped"])
)
def test_every_rank_holds_whole_chunks(lengths: list[int], length: int, world: int, layout: str) -> None:
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    wanted = [
        (document, list(range(start, min(start + length, offsets[document + 1]))))
        for document in range(len(lengths))
        for start in range(offsets[document], offsets[document + 1], length)
    ]
    found, last = [], []
    for rank in range(world):
        shard = SequenceShard.pretend(offsets[-1], rank=rank, world=world, layout=layout, cu_seqlens=offsets)
        chunks = chunks_of(shard, length)
        positions = chunks.home.positions
        # One more than the position, so that an empty cell, which is 0, is none.
        grid = chunks.grid(positions[None] + 1)
        assert torch.equal(chunks.tokens(grid)[0], positions + 1)
        cells = [[cell - 1 for cell in row if cell] for row in grid[0].tolist()]
        assert chunks.chunks.local_length == len(cells)
        ends = chunks.local_finished.array.tolist()
        assert chunks.finished.local_length == len(ends)
        last += [cells[number][-1] for number in ends]
        found += cells
        numbers = [(row[0] - offsets[next(d for d, have in wanted if have == row)]) // length for row in cells]
        assert chunks.numbers.array.tolist() == numbers
    assert found == [row for _, row in wanted]
    assert last == [row[-1] for document, row in wanted if row[-1] + 1 < offsets[document + 1]]


def test_tokens_that_lie_in_whole_chunks_stay() -> None:
    shard = SequenceShard.pretend(32, rank=1, world=4, cu_seqlens=[0, 16, 32])
    assert chunks_of(shard, 8).home is shard and chunks_of(shard, 8) is chunks_of(shard, 8)
    assert chunks_of(shard, 5).home is not shard


@pytest.mark.parametrize("world", [1, 3])
def test_no_tokens_at_all(world: int) -> None:
    shard = SequenceShard.pretend(0, rank=0, world=world)
    chunks = chunks_of(shard, 4)
    assert chunks.grid(torch.zeros(2, 0, 3)).shape == (2, 0, 4, 3)
    assert chunks.tokens(torch.zeros(2, 0, 4, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_filter_carries_what_is_not_finite_no_further_than_its_taps(value: float) -> None:
    convolution = ShortLongConvolution(2, short=2, places=2, scales=2).double()  # 4 taps
    x = torch.randn(1, 24, 2, dtype=torch.float64)
    x[0, 9, 0] = value
    y = convolution(x, chunks_of(SequenceShard(length=24), convolution.taps))
    finite = y.isfinite()[0]
    assert finite[:, 1].all() and (~finite[:, 0]).nonzero().flatten().tolist() == [9, 10, 11, 12]
