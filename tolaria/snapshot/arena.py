"""Where in the slots there is room: blocks of a few large segments, alike in both slots."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGN = 256  # bytes: a tensor's copy starts at a multiple, so that the widest loads are aligned


@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """Memory that was taken at once: as much for either slot."""

    memory: tuple[Tensor, Tensor]
    """uint8 ``(nbytes,)`` each."""

    @property
    def nbytes(self) -> int:
        """Bytes in one slot."""
        return self.memory[0].numel()


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a segment: the same bytes of either slot."""

    segment: Segment
    offset: int
    nbytes: int

    @property
    def memory(self) -> tuple[Tensor, Tensor]:
        """Its bytes in either slot."""
        first, second = (m[self.offset : self.offset + self.nbytes] for m in self.segment.memory)
        return first, second


_EMPTY = Block(Segment((torch.empty(0, dtype=torch.uint8, device="cpu"),) * 2), 0, 0)


def _size(block: Block) -> int:
    return block.nbytes


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class Arena:
    """Segments and the free blocks in them; it never changes, what changes is a new one.

    A block goes to where it fits best, what is left over stays free, and neighbours that are free are one.
    A segment of its own is taken for what fits nowhere, all at once and no larger than that, unless
    ``keeps`` says that segments stay for good: then at least as large as all that is free, so that sizes
    which grow and grow take a small multiple of the largest, not the sum of them all.

    Args:
        keeps: whether a segment stays when nothing is in it.
    """

    def __init__(self, keeps: bool, segments: tuple[Segment, ...] = (), free: tuple[Block, ...] = ()) -> None:
        self.keeps = keeps
        self.segments = segments
        self.free = free

    @property
    def nbytes(self) -> int:
        """Bytes of all segments in one slot."""
        return sum(segment.nbytes for segment in self.segments)

    def take(self, sizes: Sequence[int], new_segment: Callable[[int], Segment]) -> tuple[Arena, list[Block]]:
        """Room for so many bytes each.

        Args:
            sizes: bytes, each for one block.
            new_segment: takes memory of so many bytes for either slot; what it raises passes through, and
                nothing has changed then.

        Returns:
            What is left, and the blocks in the order of ``sizes``; those of 0 bytes belong to no segment
            that counts.
        """
        free = sorted(self.free, key=_size)
        found = dict.fromkeys((i for i, size in enumerate(sizes) if size == 0), _EMPTY)
        missing: list[int] = []
        for i in sorted((i for i in range(len(sizes)) if sizes[i]), key=lambda i: -sizes[i]):
            size = _rounded(sizes[i])
            at = bisect_left(free, size, key=_size)
            if at == len(free):
                missing.append(i)
                continue
            found[i] = self._cut(free, free.pop(at), size)
        segments = self.segments
        if missing:
            needed = sum(_rounded(sizes[i]) for i in missing)
            fresh = new_segment(max(needed, sum(map(_size, free))) if self.keeps else needed)
            rest = Block(fresh, 0, fresh.nbytes)
            for i in sorted(missing):
                found[i] = Block(fresh, rest.offset, _rounded(sizes[i]))
                rest = Block(fresh, rest.offset + found[i].nbytes, rest.nbytes - found[i].nbytes)
            if rest.nbytes:
                free.append(rest)
            segments = (*segments, fresh)
        return Arena(self.keeps, segments, tuple(free)), [found[i] for i in range(len(sizes))]

    @staticmethod
    def _cut(free: list[Block], block: Block, size: int) -> Block:
        """The first ``size`` bytes of ``block``; the others go back to ``free``."""
        if block.nbytes > size:
            insort(free, Block(block.segment, block.offset + size, block.nbytes - size), key=_size)
        return Block(block.segment, block.offset, size)

    def give(self, blocks: Iterable[Block]) -> Arena:
        """The arena with these blocks free again; a segment without others goes, unless it is kept."""
        by_segment: dict[Segment, list[Block]] = {segment: [] for segment in self.segments}
        for block in (*self.free, *blocks):
            if block.nbytes:
                by_segment[block.segment].append(block)
        segments, free = [], []
        for segment, pieces in by_segment.items():
            joined = self._joined(pieces)
            if self.keeps or not joined or joined[0].nbytes < segment.nbytes:
                segments.append(segment)
                free += joined
        return Arena(self.keeps, tuple(segments), tuple(free))

    @staticmethod
    def _joined(pieces: list[Block]) -> list[Block]:
        """Blocks of one segment, neighbours made one."""
        joined: list[Block] = []
        for block in sorted(pieces, key=lambda block: block.offset):
            if joined and joined[-1].offset + joined[-1].nbytes == block.offset:
                last = joined.pop()
                block = Block(last.segment, last.offset, last.nbytes + block.nbytes)
            joined.append(block)
        return joined
