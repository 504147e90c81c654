"""What a dry run sees and answers, on small fake tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from longtrain.dry_run import TERMS
from longtrain.dry_run.modes import Fakes, Program
from longtrain.dry_run.tracker import Term, Tracker
from longtrain.kernels import causal_conv1d, launching, linear_cross_entropy, softmax_attention
from longtrain.parallel import SequenceShard
from longtrain.parallel.attention import ring
from longtrain.parallel.attention.plan import ring_plan

CPU = torch.device("cpu")
MIB = 2**20


@contextmanager
def dry() -> Iterator[tuple[Tracker, Program]]:
    fakes, tracker = Fakes(), Tracker(CPU)
    program = Program(CPU, fakes, tracker)
    with fakes, tracker, program:
        yield tracker, program


def test_every_storage_counts_until_it_is_gone():
    with dry() as (tracker, _):
        x = torch.zeros(MIB, dtype=torch.uint8)
        with tracker.making(Term.LOSS):
            y = torch.zeros(3 * MIB, dtype=torch.uint8)
            views = [y[1:], y.view(3, MIB)]
        assert tracker.held() == dict.fromkeys(TERMS, 0) | {"working set": MIB, "loss": 3 * MIB, "total": 4 * MIB}
        tracker.mark([x], Term.WEIGHTS)
        del y, views
        assert tracker.held()["total"] == tracker.held()["weights"] == MIB
        assert tracker.peak()["total"] == 4 * MIB
        tracker.restart()
        assert tracker.peak()["total"] == MIB
        x.untyped_storage().resize_(0)
        assert tracker.held()["total"] == 0


def test_fake_numbers_are_fine_and_host_data_is_real():
    with dry() as (_, program):
        x = torch.randn(4, 4)
        assert bool(x.isfinite().all()) and not bool((x > 0).any()) and x.sum().item() == 1.0
        assert torch.equal(x, x) and int(torch.zeros((), dtype=torch.int64)) == 1
        with program.preparing():
            positions = torch.arange(5) * 2
            assert type(positions) is Tensor and positions.tolist() == [0, 2, 4, 6, 8]
        assert x.index_select(0, positions[:2]).shape == (2, 4)  # both kinds at once


def test_host_data_stays_real_inside_registered_operators():
    """Boundaries of documents, for one, which operators look at."""
    with dry() as (_, program):
        with program.preparing():
            boundaries = torch.tensor([0, 5, 12])
        x, weight = torch.randn(1, 12, 8), torch.randn(8, 4)
        assert causal_conv1d(x, weight, cu_seqlens=boundaries).shape == x.shape


def test_bodies_of_registered_operators_are_seen():
    hidden, width, vocabulary = 2048, 64, 4096
    with dry() as (tracker, _):
        x, weight = torch.randn(hidden, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
        targets = torch.zeros(hidden, dtype=torch.int64)
        tracker.restart()
        linear_cross_entropy(x, weight, targets).backward()
        assert tracker.peak()["loss"] > 1024 * 1024 * 4  # a tile of logits, [1024, 1024]
        assert x.grad is not None and x.grad.shape == x.shape
        assert tracker.held()["loss"] == 0


def test_fake_is_as_real():
    """The account of a call and its backward is the same with numbers and without."""

    def peak(tracker: Tracker) -> dict[str, int]:
        q, k, v = (torch.randn(1, 300, 2, 64, requires_grad=True) for _ in range(3))
        tracker.restart()
        out, _ = softmax_attention(q, k, v, backend="torch")
        out.square().sum().backward()
        return tracker.peak()

    with dry() as (tracker, _):
        fake = peak(tracker)
    tracker = Tracker(CPU)
    with tracker, Program(CPU, None, tracker):
        real = peak(tracker)
    # Masks are host data: real tensors, which a dry run does not count.
    assert fake["total"] == pytest.approx(real["total"], rel=0.02)
    assert fake["working set"] > 4 * 300 * 2 * 64 * 4


def test_tiles_that_repeat_are_left_out_on_pretended_cards(monkeypatch: pytest.MonkeyPatch):
    tiles, card = list(range(9)), torch.device("meta")
    assert launching.visited(tiles, card) == launching.visited(tiles, CPU) == tiles
    monkeypatch.setattr(launching, "_pretended", ["sm_90"])
    assert launching.visited(tiles, card) == [0, 1, 8] and launching.visited(tiles, card, first=3) == [0, 1, 2, 8]
    assert launching.visited(tiles[:3], card) == [0, 1, 2] and launching.visited([], card) == []
    assert launching.visited(tiles, CPU) == tiles  # whose numbers may be real


def test_steps_of_a_ring_that_repeat_are_left_out_on_pretended_cards(monkeypatch: pytest.MonkeyPatch):
    card = torch.device("meta")

    def senders(length: int, device: torch.device) -> list[int]:
        shard = SequenceShard.pretend(length, rank=0, world=8, layout="zigzag")
        (stage,) = ring._to_visit(ring_plan(shard, shard, causal=True, window=None, degree=1), device).stages
        return [step.sender for step in stage.rounds]

    every = [0, 7, 6, 5, 4, 3, 2, 1]
    assert senders(1024, card) == every
    monkeypatch.setattr(launching, "_pretended", ["sm_90"])
    assert senders(1024, card) == [0, 7, 6, 1]  # the third one has both on their way, keys and gradients
    assert senders(1024, CPU) == senders(1001, card) == every  # with uneven shards steps differ
