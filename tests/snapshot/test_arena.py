"""Room in the slots: blocks never overlap, free neighbours are one, and what is free is used first."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tolaria.errors import SnapshotError
from tolaria.snapshot.arena import ALIGN, Arena, Block, Segment


def new_segment(nbytes: int) -> Segment:
    first, second = (torch.empty(nbytes, dtype=torch.uint8) for _ in (0, 1))
    return Segment((first, second))


def check(arena: Arena, used: list[Block]) -> None:
    """Used and free blocks tile the segments; no two free ones are neighbours."""
    pieces: dict[Segment, list[tuple[int, int, bool]]] = {segment: [] for segment in arena.segments}
    for block, is_free in [*((b, False) for b in used), *((b, True) for b in arena.free)]:
        if block.nbytes:
            assert block.offset % ALIGN == 0
            pieces[block.segment].append((block.offset, block.nbytes, is_free))
    for segment, found in pieces.items():
        found.sort()
        ends = [0, *(offset + nbytes for offset, nbytes, _ in found)]
        assert [offset for offset, _, _ in found] == ends[:-1], "a gap or an overlap"
        assert ends[-1] == segment.nbytes
        assert not any(a[2] and b[2] for a, b in pairwise(found)), "free neighbours are not joined"


SIZES = st.lists(st.integers(0, 3000), max_size=5)


@pytest.mark.parametrize("keeps", [False, True])
@given(st.lists(st.tuples(SIZES, st.randoms(use_true_random=False)), max_size=20))
@example([([256, 256, 256], random.Random(0)), ([512], random.Random(1)), ([0, 1], random.Random(2))])
def test_blocks_tile_the_segments(keeps: bool, rounds: list[tuple[list[int], random.Random]]) -> None:
    arena, used = Arena(keeps), list[Block]()
    for sizes, draw in rounds:
        before = {segment: segment.nbytes for segment in arena.segments}
        largest = max((block.nbytes for block in arena.free), default=0)
        arena, blocks = arena.take(sizes, new_segment)
        assert [b.nbytes for b in blocks] == [-(-size // ALIGN) * ALIGN for size in sizes]
        if sizes and max(sizes) <= largest and len(sizes) == 1:
            assert len(arena.segments) == len(before), "there was room"
        used += blocks
        check(arena, used)
        for first, second in (block.memory for block in blocks):
            assert first.numel() == second.numel()
        gone = [block for block in used if draw.random() < 0.5]
        used = [block for block in used if not any(block is other for other in gone)]
        arena = arena.give(gone)
        check(arena, used)
    arena = arena.give(used)
    check(arena, [])
    if not keeps:
        assert not arena.segments, "a segment without blocks goes"


@pytest.mark.parametrize(("keeps", "most"), [(False, 1.0), (True, 4.0)])
@pytest.mark.parametrize("order", ["growing", "shrinking", "random"])
def test_sizes_that_vary_take_a_small_multiple_of_the_largest(keeps: bool, most: float, order: str) -> None:
    sizes = list(range(ALIGN, 300 * ALIGN, ALIGN))
    if order != "growing":
        sizes = sizes[::-1] if order == "shrinking" else random.Random(0).sample(sizes, len(sizes))
    arena = Arena(keeps)
    for size in sizes:
        arena, blocks = arena.take([size // 3, size, 7], new_segment)
        needed = sum(block.nbytes for block in blocks)
        assert keeps or arena.nbytes == needed
        arena = arena.give(blocks)
    assert arena.nbytes <= most * (300 * ALIGN + 100 * ALIGN + ALIGN)


def test_the_best_fit_is_cut_and_the_first_segment_is_exact() -> None:
    arena, (small, gap, large, _) = Arena(False).take([512, 256, 1024, 256], new_segment)
    assert arena.nbytes == 2048
    assert not arena.free
    arena = arena.give([small, large])
    arena, (fits,) = arena.take([300], new_segment)
    assert (fits.segment, fits.offset) == (gap.segment, small.offset)
    arena, (cut,) = arena.take([300], new_segment)
    assert (cut.offset, cut.nbytes) == (large.offset, 512)
    assert [(b.offset, b.nbytes) for b in arena.free] == [(large.offset + 512, 512)]


def test_without_memory_nothing_has_changed() -> None:
    def exhausted(nbytes: int) -> Segment:
        raise SnapshotError(f"no {nbytes} bytes")

    arena, blocks = Arena(False).take([256, 512], new_segment)
    arena = arena.give(blocks[:1])
    free, segments = arena.free, arena.segments
    with pytest.raises(SnapshotError, match="no 1024 bytes"):
        arena.take([256, 1000], exhausted)
    assert (arena.free, arena.segments) == (free, segments)
