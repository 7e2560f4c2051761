"""The double buffer: memory for two captures, and the table that says what lies where in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import SnapshotError
from tolaria.governor.memory import allocate
from tolaria.governor.tracked import TrackedTensor
from tolaria.ops import SnapshotEntry, SnapshotTable, live_view, slot_view

_ALIGN = 256  # bytes: a tensor's copy starts at a multiple, so that the widest loads are aligned


PlaceKey = tuple[Hashable, torch.Size, tuple[int, ...], torch.dtype]
"""A tensor's key and its form: one that comes back in another form is another tensor."""


def place_key(tracked: TrackedTensor) -> PlaceKey:
    """Where ``tracked`` belongs."""
    tensor = tracked.tensor
    return tracked.key, tensor.shape, tensor.stride(), tensor.dtype


@dataclass(slots=True)
class Place:
    """One tensor's place in the slots."""

    key: Hashable
    name: str
    owner: Tensor
    """Kept alive while the place exists, since the key may hold its id."""
    live: Tensor
    """Distinct elements of the tensor as it was last seen."""
    memory: tuple[Tensor, Tensor]
    """Its bytes in either slot."""
    slots: tuple[Tensor, Tensor]
    """The same, with the tensor's dtype and shape."""
    present: list[bool]
    """Per slot: whether the last capture into it covered the tensor (known on the CPU: the host decides)."""
    is_live: bool = True
    """False: the owner dropped the tensor, but a slot that may be restored still has it."""


class Slots:
    """Two copies of the covered state.

    Memory is taken once; growth adds to it, so that what a slot holds stays where it is, and a tensor that
    goes away leaves its room to the next of the same size. A tensor that appears later gets its value at that
    moment in both slots (its birth value), optimizer state what it was before the first step.

    Args:
        device: where the live tensors are.
        storage: ``"pinned"`` or ``"device"``; on the CPU slots are ordinary memory either way.
    """

    def __init__(self, device: torch.device, storage: str = "pinned") -> None:
        self.device = device
        self._storage = storage
        self.places: dict[PlaceKey, Place] = {}
        self.exempt: set[Hashable] = set()
        self.names: list[str] = []
        self.table = SnapshotTable(device=device)
        self.segments: list[Tensor] = []
        self._free: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._seen: list[tuple[object, ...]] = []
        self._live_keys: frozenset[Hashable] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of both slots."""
        return sum(segment.numel() for segment in self.segments)

    def is_current(self, tensors: Sequence[TrackedTensor]) -> bool:
        """Whether these are the tensors that the table points to."""
        return self._signature(tensors) == self._seen

    @staticmethod
    def _signature(tensors: Sequence[TrackedTensor]) -> list[tuple[object, ...]]:
        return [(t.tensor.data_ptr(), place_key(t), t.watched, t.zeroed, t.part) for t in tensors]

    def sync(self, tensors: Sequence[TrackedTensor]) -> bool:
        """Bring the places in line with ``tensors``; True when something had changed.

        Raises:
            SnapshotError: a tensor cannot be copied byte by byte (sparse, quantized), or memory ran out.
                Nothing has changed then.
        """
        for tracked in tensors:
            if tracked.tensor.layout != torch.strided or tracked.tensor.is_quantized:
                raise SnapshotError(
                    f"{tracked.name}: expected a dense tensor, got layout {tracked.tensor.layout}; "
                    "a snapshot copies bytes"
                )
        signature = self._signature(tensors)
        if signature == self._seen:
            return False
        live = {place_key(t): (t, live_view(t.tensor)) for t in tensors}
        born = {key: found for key, found in live.items() if key not in self.places}
        room = self._room_for([view for _, view in born.values()])
        self._drop(key for key, place in self.places.items() if key not in live and not any(place.present))
        for (key, (tracked, view)), memory in zip(born.items(), room, strict=True):
            self.places[key] = self._born(tracked, view, memory)
        for key, place in self.places.items():
            place.is_live = key in live
            if place.is_live:
                place.live = live[key][1]
        self._seen = signature
        self._live_keys = frozenset(key for key, place in self.places.items() if place.is_live)
        self._build_table(live)
        return True

    def _room_for(self, views: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Room in both slots for each view: what is free, and one new segment for the rest."""
        sizes = [-(-view.numel() * view.element_size() // _ALIGN) * _ALIGN for view in views]
        free = {size: list(pairs) for size, pairs in self._free.items()}
        found = [free[size].pop() if free.get(size) else None for size in sizes]
        missing = sum(size for size, pair in zip(sizes, found, strict=True) if pair is None)
        segments = [allocate(missing, self.device, self._storage) for _ in (0, 1)] if missing else []
        self._free = defaultdict(list, free)
        self.segments += segments
        room, offset = [], 0
        for size, pair in zip(sizes, found, strict=True):
            if pair is None:
                empty = torch.empty(0, dtype=torch.uint8)
                pair = (
                    (segments[0][offset : offset + size], segments[1][offset : offset + size])
                    if size
                    else (empty, empty)
                )
                offset += size
            room.append(pair)
        return room

    def _drop(self, keys: Iterable[PlaceKey]) -> None:
        for key in list(keys):
            place = self.places.pop(key)
            self._free[place.memory[0].numel()].append(place.memory)

    @staticmethod
    def _born(tracked: TrackedTensor, view: Tensor, memory: tuple[Tensor, Tensor]) -> Place:
        slots = (slot_view(memory[0], 0, view), slot_view(memory[1], 0, view))
        value = view
        if tracked.zeroed or tracked.kind == "optimizer":
            fresh = None if tracked.zeroed else tracked.fresh_value
            value = torch.zeros_like(view)
            if fresh is not None:
                value.copy_(fresh) if isinstance(fresh, Tensor) else value.fill_(fresh)
        for slot in slots:
            slot.copy_(value, non_blocking=True)
        # Model tensors born later belong to both slots with their birth value; other state does not.
        present = [tracked.kind in ("parameter", "buffer")] * 2
        return Place(tracked.key, tracked.name, tracked.owner, view, memory, slots, present)

    def _build_table(self, live: dict[PlaceKey, tuple[TrackedTensor, Tensor]]) -> None:
        self.names = [place.name for place in self.places.values()]
        entries = []
        for index, (key, place) in enumerate(self.places.items()):
            if key not in live:
                continue
            tracked = live[key][0]
            searched = tracked.watched and place.key not in self.exempt
            entries.append(
                SnapshotEntry(
                    place.live, place.slots, tracked.part, index if searched else -1, tracked.zeroed
                )
            )
        self.table.update(entries)

    def mark_captured(self, slot: int) -> frozenset[Hashable]:
        """Note that slot now holds exactly the live tensors; returns their keys."""
        for place in self.places.values():
            place.present[slot] = place.is_live
        return self.live_keys()

    def keep(self, keys: frozenset[Hashable]) -> None:
        """Note that either slot may hold the tensors of ``keys``, and of no others that are gone."""
        for key, place in self.places.items():
            place.present = [key in keys] * 2

    def live_keys(self) -> frozenset[Hashable]:
        """Keys of the tensors that a capture covers now."""
        return self._live_keys

    def missing_live(self, slot: int, keys: frozenset[Hashable]) -> list[tuple[Hashable, Tensor]]:
        """Tensors of ``keys`` that ``slot`` holds but their owner dropped: fresh copies on their device."""
        found: list[tuple[Hashable, Tensor]] = []
        for key, place in self.places.items():
            if not place.is_live and key in keys:
                _, shape, stride, dtype = key
                copy = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
                live_view(copy).copy_(place.slots[slot])
                found.append((place.key, copy))
        return found

    def forget_optimizer(self, optimizer: Optimizer) -> None:
        """Drop the places of its state and its hyper-parameters."""
        theirs = ("state", id(optimizer)), ("group", id(optimizer))
        self._drop(k for k, p in self.places.items() if isinstance(p.key, tuple) and p.key[:2] in theirs)
        self._seen = []
