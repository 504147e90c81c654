"""What MoBA sends: block means to all, and of keys and values just the blocks that somebody picked."""

import pytest
import torch

from longtrain.layers import LayerPlace
from longtrain.layers.chunks import chunks_of
from longtrain.layers.mixers.moba import MoBAConfig, MoBAMixer, pick_blocks
from longtrain.parallel import SequenceShard, count_messages
from tests.distributed import run_distributed

LENGTH, BLOCK, HEADS, GROUPS, WIDTH = 256, 8, 4, 2, 8
DOCUMENTS = [0, 100, 256]


def exchanged(rank: int, world: int, picks: int) -> tuple[int, int]:
    """Bytes that this rank receives in a layer's forward pass, and what its queries and the means account for."""
    import torch.distributed as dist

    torch.manual_seed(3)
    config = MoBAConfig(heads=HEADS, kv_heads=GROUPS, block=BLOCK, picks=picks)
    mixer = MoBAMixer(config, LayerPlace(32, 0, 1))
    x = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(4))
    shard = SequenceShard(length=LENGTH, group=dist.group.WORLD, cu_seqlens=DOCUMENTS)
    blocks = chunks_of(shard, BLOCK)
    home = blocks.home
    with count_messages() as counter, torch.no_grad():
        mixer(home.split(x, dim=1), home)
    # The same picks, one after the other, on one device.
    whole = SequenceShard(length=LENGTH, cu_seqlens=DOCUMENTS)
    own = chunks_of(whole, BLOCK)
    with torch.no_grad():
        q, k, _ = mixer._project(x, whole.document_positions)
        finished = own.local_finished.array
        means = own.grid(k)[:, finished].mean(2).movedim(1, 0)
        chunk = own.places.array // BLOCK
        first, count = (torch.from_numpy(z.array[chunk]) for z in (own.first_finished, own.numbers))
        picked = pick_blocks(q, means, first, count, picks - 1)[0]
    bounds = [sum(blocks.finished.lengths[:other]) for other in range(world + 1)]
    needed = {
        (block, head // (HEADS // GROUPS))
        for token in home.positions.tolist()
        for head in range(HEADS)
        for block in picked[token, head].tolist()
        if block >= 0 and not bounds[rank] <= block < bounds[rank + 1]
    }
    number = 4  # bytes
    rows = max(blocks.finished.lengths)  # gathers are padded to equal parts
    means_bytes = (world - 1) * rows * GROUPS * WIDTH * number
    requests = (world - 1) * len(finished) * GROUPS  # a byte each
    blocks_bytes = len(needed) * BLOCK * 2 * WIDTH * number
    others = LENGTH - home.local_length
    assert blocks_bytes < others * GROUPS * 2 * WIDTH * number  # less than a whole gather: else nothing is shown
    return counter.received_bytes, means_bytes + requests + blocks_bytes


@pytest.mark.parametrize("picks", [2, 3])
def test_only_picked_blocks_and_means_travel(picks: int) -> None:
    for received, allowed in run_distributed(4, exchanged, picks):
        assert 0 < received <= allowed


def test_a_query_picks_the_best_blocks_of_its_document_before_its_own() -> None:
    means = torch.tensor([5.0, 1.0, 4.0, 9.0, 2.0])[:, None, None, None]  # of two documents: 0, 1, 2 and 3, 4
    q = torch.ones(1, 4, 1, 1)
    first, count = torch.tensor([0, 0, 0, 3]), torch.tensor([0, 1, 3, 1])
    assert pick_blocks(q, means, first, count, 2)[0, :, 0].tolist() == [[-1, -1], [0, -1], [0, 2], [3, -1]]
    assert pick_blocks(-q, means, first, count, 2)[0, 2, 0].tolist() == [1, 2]
    assert pick_blocks(q, means[:0], first, 0 * count, 2).eq(-1).all()
