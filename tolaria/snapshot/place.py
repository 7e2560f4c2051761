"""One tensor's place in the slots, and what is there before any capture filled it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tolaria.ops import live_view, slot_view
from tolaria.ops._layout import runs
from tolaria.snapshot.arena import Block
from tolaria.snapshot.covered import CoveredTensor


class PlaceKey(NamedTuple):
    """A tensor's key and its form: one that comes back in another form is another tensor."""

    key: Hashable
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    is_conj: bool
    is_neg: bool


def place_key(covered: CoveredTensor) -> PlaceKey:
    """Where ``covered`` belongs."""
    t = covered.tensor
    return PlaceKey(covered.key, t.shape, t.stride(), t.dtype, t.is_conj(), t.is_neg())


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's place in the slots."""

    key: Hashable
    name: str
    number: int
    """What a capture reports when it finds a non-finite value here."""
    anchor: object
    """Kept alive while the place exists, since the key holds its id."""
    birth: int
    """Which place it is of all that there ever were, from 1."""
    live: Tensor
    """The tensor as it was last seen; see :func:`tolaria.ops.live_view`."""
    block: Block
    """Its bytes in either slot."""
    slots: tuple[Tensor, Tensor]
    """The same, with the tensor's dtype and shape."""
    is_live: bool = True
    """False: the owner dropped the tensor, but a slot that may be restored still has it."""

    @classmethod
    def of(cls, covered: CoveredTensor, view: Tensor, block: Block, number: int, birth: int) -> Place:
        """The place of ``covered``, whose :func:`tolaria.ops.live_view` is ``view``."""
        first, second = block.memory
        slots = slot_view(first, 0, view), slot_view(second, 0, view)
        return cls(covered.key, covered.name, number, covered.anchor, birth, view, block, slots)


def fresh_copy(key: PlaceKey, place: Place, slot: int) -> Tensor:
    """What ``slot`` holds of a place, as a new tensor of its form on its device."""
    copy = torch.empty_strided(key.shape, key.stride, dtype=key.dtype, device=place.live.device)
    live_view(copy).copy_(place.slots[slot])
    return _signed(key, copy)


def stored(key: PlaceKey, memory: Tensor) -> Tensor:
    """The tensor whose distinct elements are ``memory``, a slot's or a copy of it: a view of that."""
    if memory.numel() == 0:
        memory = memory.new_empty(key.shape)
    elif memory.dim() != len(key.shape):  # elements that overlapped
        memory = memory.as_strided(key.shape, key.stride)
    return _signed(key, memory.expand(key.shape))


def _signed(key: PlaceKey, memory: Tensor) -> Tensor:
    memory = memory.conj() if key.is_conj else memory
    return torch._neg_view(memory) if key.is_neg else memory


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; waits for the device."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.layout is torch.sparse_coo:
        tensor = tensor._values()
    try:
        return bool(torch.isfinite(tensor).all())  # sync: where a tensor joins
    except NotImplementedError:  # float8 and smaller
        pass
    try:
        return bool(torch.isfinite(tensor.to(torch.float32)).all())  # sync: likewise
    except (NotImplementedError, RuntimeError):
        return True  # nobody can look at it; it is copied


def _birth_value(covered: CoveredTensor, view: Tensor) -> Tensor:
    """What a slot holds of a tensor that appeared after its capture, as stored in memory."""
    if covered.zeroed:
        return torch.zeros_like(view)
    if covered.kind != "optimizer":
        return view
    value, fresh = torch.zeros_like(view), covered.fresh_value
    if fresh is not None:
        value.copy_(fresh) if isinstance(fresh, Tensor) else value.fill_(fresh)
    value = value.conj_physical() if covered.tensor.is_conj() else value
    return value.neg() if covered.tensor.is_neg() else value


def write_birth_value(covered: CoveredTensor, place: Place, slots: Iterable[int]) -> None:
    """Fill ``slots`` of a place that nothing points to yet; on CUDA enqueued on the current stream."""
    value = _birth_value(covered, place.live)
    for slot in slots:
        place.slots[slot].copy_(value, non_blocking=True)


class MemoryMap:
    """Which covered tensors lie where: a view that joins belongs to a memory that may be covered already."""

    def __init__(self, places: Iterable[Place]) -> None:
        found = [
            (start, start + nbytes, place, offset)
            for place in places
            for start, offset, nbytes in runs(place.live)
        ]
        self._runs = sorted(found, key=lambda run: run[0])
        self._starts = [run[0] for run in self._runs]
        self._longest = max((end - start for start, end, *_ in self._runs), default=0)

    def inherit(self, place: Place, slots: Sequence[int]) -> None:
        """Give ``slots`` of a new place what they hold of the same bytes under another name.

        A view of a parameter that is registered later, say, would otherwise be restored to its birth value,
        and the parameter with it.
        """
        for start, offset, nbytes in runs(place.live):
            first = bisect_right(self._starts, start - self._longest)
            last = bisect_right(self._starts, start + nbytes - 1)
            for other_start, other_end, other, other_offset in self._runs[first:last]:
                low, high = max(start, other_start), min(start + nbytes, other_end)
                if low < high:
                    to, at = offset + low - start, other_offset + low - other_start
                    for slot in slots:
                        _copy_bytes(place, to, other, at, high - low, slot)


def _copy_bytes(target: Place, to: int, source: Place, at: int, nbytes: int, slot: int) -> None:
    taken = source.block.memory[slot][at : at + nbytes]
    # Through the device, if that is where it is used: copies between host memory do not wait for its stream.
    carried = taken.to(target.live.device, non_blocking=True)
    target.block.memory[slot][to : to + nbytes].copy_(carried, non_blocking=True)
