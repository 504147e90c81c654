"""Layouts against plain Python: who holds what, what is counted, which names and which layouts are refused."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtrain.parallel.layouts import (
    BlockCyclic,
    Contiguous,
    Cuts,
    Layout,
    Marked,
    Repeated,
    Zigzag,
    check_partition,
    count_in_runs,
    layout_named,
    layout_names,
)

WHOLE = np.array([0], dtype=np.int64)  # the built-in layouts do not look at documents


def owner(layout: str, position: int, world: int, length: int) -> int:
    """The rank that holds a position, one position at a time, from the layouts' descriptions."""
    if layout == "contiguous":
        return next(r for r in range(world) if r * length // world <= position < (r + 1) * length // world)
    if layout == "zigzag":
        cuts = [i * length // (2 * world) for i in range(2 * world + 1)]
        chunk = next(c for c in range(2 * world) if cuts[c] <= position < cuts[c + 1])
        return min(chunk, 2 * world - 1 - chunk)
    width = int(layout.partition(":")[2] or 1)
    return position // width % world


names = st.one_of(
    st.sampled_from(["contiguous", "zigzag", "striped"]), st.integers(1, 9).map(lambda width: f"striped:{width}")
)


@given(name=names, world=st.integers(1, 6), length=st.integers(0, 70))
def test_every_layout_holds_and_counts_what_it_says(name: str, world: int, length: int) -> None:
    layout = layout_named(name)
    owners = [owner(name, position, world, length) for position in range(length)]
    every_position = np.arange(length + 1)
    assert layout.owners(every_position[:-1], world, length, WHOLE).tolist() == owners
    assert Layout.owners(layout, every_position[:-1], world, length, WHOLE).tolist() == owners  # by searching
    for rank in range(world):
        runs = layout.runs(rank, world, length, WHOLE)
        assert runs.dtype == np.int64 and runs.ndim == 2
        assert (np.diff(runs.reshape(-1)) >= 0).all()
        held = [position for start, stop in runs.tolist() for position in range(start, stop)]
        assert held == [position for position in range(length) if owners[position] == rank]
        expected = [owners[:position].count(rank) for position in range(length + 1)]
        assert layout.count(every_position, rank, world, length, WHOLE).tolist() == expected
        assert count_in_runs(every_position, runs).tolist() == expected


@given(cuts=st.lists(st.integers(0, 30), max_size=5), length=st.integers(30, 40))
def test_cuts_hold_and_count_what_lies_between_their_bounds(cuts: list[int], length: int) -> None:
    bounds, world = (0, *sorted(cuts), length), len(cuts) + 1
    layout, every_position = Cuts(bounds), np.arange(length + 1)
    check_partition(layout, world, length, WHOLE)
    owners = [max(rank for rank in range(world) if bounds[rank] <= position) for position in range(length)]
    assert layout.owners(every_position[:-1], world, length, WHOLE).tolist() == owners
    assert Layout.owners(layout, every_position[:-1], world, length, WHOLE).tolist() == owners
    for rank in range(world):
        assert layout.runs(rank, world, length, WHOLE).tolist() == [list(bounds[rank : rank + 2])]
        expected = [owners[:position].count(rank) for position in range(length + 1)]
        assert layout.count(every_position, rank, world, length, WHOLE).tolist() == expected


@given(cuts=st.lists(st.integers(0, 9), max_size=4), size=st.integers(9, 12), copies=st.integers(1, 3))
def test_copies_hold_and_count_what_lies_between_their_bounds(cuts: list[int], size: int, copies: int) -> None:
    bounds, world, length = (0, *sorted(cuts), size), len(cuts) + 1, copies * size
    layout, every_position = Repeated(bounds, copies), np.arange(length + 1)
    check_partition(layout, world, length, WHOLE)
    one = [max(rank for rank in range(world) if bounds[rank] <= position) for position in range(size)]
    owners = one * copies
    assert layout.owners(every_position[:-1], world, length, WHOLE).tolist() == owners
    for rank in range(world):
        assert count_in_runs(every_position, layout.runs(rank, world, length, WHOLE)).tolist() == [
            owners[:position].count(rank) for position in range(length + 1)
        ]
        expected = [owners[:position].count(rank) for position in range(length + 1)]
        assert layout.count(every_position, rank, world, length, WHOLE).tolist() == expected


def test_marked_keys_count_from_the_position_after_their_mark() -> None:
    layout, every_position = Marked((np.array([2, 2, 5]), np.array([], dtype=np.int64)), each=3), np.arange(8)
    check_partition(layout, 2, 7, WHOLE)
    assert layout.count(every_position, 0, 2, 7, WHOLE).tolist() == [0, 0, 0, 6, 6, 6, 9, 9]
    assert not layout.count(every_position, 1, 2, 7, WHOLE).any()
    assert layout.runs(0, 2, 7, WHOLE)[:, 0].tolist() == [2, 2, 5]
    with pytest.raises(ValueError, match="layout 'marked': its keys have no positions of their own"):
        layout.owners(every_position, 2, 7, WHOLE)


@pytest.mark.parametrize("bounds", [(0, 9), (0, 5, 8), (1, 5, 9), (0, 7, 5, 9)])
def test_cuts_that_do_not_fit_are_refused(bounds: tuple[int, ...]) -> None:
    if bounds == (0, 9):
        check_partition(Cuts(bounds), 1, 9, WHOLE)
    with pytest.raises(ValueError, match="bounds: got .*, expected 3|4 that never decrease, from 0 to 9"):
        check_partition(Cuts(bounds), 2 if len(bounds) != 4 else 3, 9, WHOLE)


@given(world=st.integers(1, 9), length=st.integers(0, 200))
def test_parts_are_even(world: int, length: int) -> None:
    def sizes(layout: Layout) -> list[int]:
        return [int(layout.count(np.array([length]), rank, world, length, WHOLE)[0]) for rank in range(world)]

    for layout, slack in ((Contiguous(), 1), (BlockCyclic(), 1), (Zigzag(), 2), (BlockCyclic(5), 5)):
        assert max(sizes(layout)) - min(sizes(layout)) <= slack, layout


@pytest.mark.parametrize("name", ["contiguous", "zigzag", "striped", "striped:128", "balanced"])
def test_names_lead_to_layouts_and_back(name: str) -> None:
    layout = layout_named(name)
    assert layout.name == name
    assert layout == layout_named(name) and layout_named(layout) is layout
    assert layout.long_segments == (name in ("contiguous", "zigzag"))


def test_striped_1_is_striped() -> None:
    assert layout_named("striped:1") == layout_named("striped") == BlockCyclic(1)
    assert layout_named("striped:2") != layout_named("striped:3")


@pytest.mark.parametrize(
    ("given_name", "told"),
    [
        ("zigzig", "'zigzag'"),
        ("Contiguous", "'contiguous'"),
        ("stripe:64", "'striped:64'"),
        ("even", "contiguous, zigzag, striped, balanced"),
        ("balance", "'balanced'"),
        ("balanced:128", "takes no width"),
        ("", "striped:w"),
        ("striped:", "striped:128"),
        ("striped:0", "from 1 on"),
        ("striped:-3", "from 1 on"),
        ("striped:1.5", "from 1 on"),
        ("striped:²", "from 1 on"),
        ("zigzag:4", "takes no width"),
        (7, "expected a name"),
        (None, "expected a name"),
    ],
)
def test_other_names_are_refused_with_what_would_work(given_name: object, told: str) -> None:
    with pytest.raises(ValueError, match="layout: got") as refusal:
        layout_named(given_name)  # pyright: ignore[reportArgumentType] - wrong types are what is tested
    assert told in str(refusal.value) and repr(given_name) in str(refusal.value)


@pytest.mark.parametrize("width", [0, -1, 2.0, True, "8"])
def test_block_widths_are_whole_numbers_from_1_on(width: object) -> None:
    with pytest.raises(ValueError, match="width: got"):
        BlockCyclic(width)  # pyright: ignore[reportArgumentType] - wrong types are what is tested


def test_layouts_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        BlockCyclic(4).width = 5  # pyright: ignore[reportAttributeAccessIssue] - the refusal is what is tested
    assert set(layout_names()) == {"contiguous", "zigzag", "striped", "balanced", "striped:w"}


class Reversed(Layout):
    """The ranks in reverse order; `runs` is all that a layout must have."""

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        chunk = world - 1 - rank
        return np.array([[chunk * length // world, (chunk + 1) * length // world]])


def test_a_layout_of_ones_own_needs_only_runs() -> None:
    layout = Reversed()
    assert layout.name == "Reversed" and not layout.long_segments
    check_partition(layout, 3, 10, WHOLE)
    assert layout.count(np.array([0, 5, 7, 10]), 0, 3, 10, WHOLE).tolist() == [0, 0, 1, 4]


class Broken(Layout):
    """A layout that gives two ranks of a sequence of 6 the runs it was made with."""

    def __init__(self, *runs: object) -> None:
        self.parts = runs

    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.array(self.parts[rank])


class Listed(Layout):
    def runs(self, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return [[0, length]] if rank else []  # pyright: ignore[reportReturnType] - the refusal is what is tested


class Miscounting(Reversed):
    def count(self, positions: np.ndarray, rank: int, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return super().count(positions, rank, world, length, cu_seqlens) + (rank == 1)


class Misnaming(Reversed):
    def owners(self, positions: np.ndarray, world: int, length: int, cu_seqlens: np.ndarray) -> np.ndarray:
        return np.zeros_like(positions)


@pytest.mark.parametrize(
    ("layout", "told"),
    [
        (Broken([[0, 4]], [[3, 6]]), "position 3 belongs to rank 0 too"),
        (Broken([[0, 2]], [[3, 6]]), "position 2 of 6 belongs to no rank"),
        (Broken([[0, 3]], [[3, 7]]), "within 0 ... 6"),
        (Broken([[-1, 3]], [[3, 6]]), "within 0 ... 6"),
        (Broken([[2, 3], [0, 2]], [[3, 6]]), "increasing"),
        (Broken([[3, 0]], [[0, 6]]), "increasing"),
        (Broken([0, 3], [3, 6]), r"int64 \[2\], expected int64 \[n, 2\]"),
        (Broken([[0.0, 3.0]], [[3.0, 6.0]]), "float64"),
        (Listed(), "got list"),
        (Miscounting(), r"count\(\) .* disagrees"),
        (Misnaming(), r"owners\(\) disagrees"),
    ],
)
def test_a_layout_that_is_no_partition_is_refused(layout: Layout, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_partition(layout, 2, 6, WHOLE)
