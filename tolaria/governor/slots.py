"""The double buffer: memory for two captures, and the table that says what lies where in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria.errors import SnapshotError
from tolaria.governor.tracked import Kind, TrackedTensor
from tolaria.ops import SnapshotEntry, SnapshotTable, live_view, slot_view

_ALIGN = 256  # bytes: a tensor's copy starts at a multiple, so that the widest loads are aligned


@dataclass(slots=True)
class Place:
    """One tensor's place in the slots."""

    name: str
    kind: Kind
    owner: Tensor
    """Kept alive while the place exists, since the key may hold its id."""
    live: Tensor
    """Distinct elements of the tensor as it was last seen."""
    slots: tuple[Tensor, Tensor]
    present: list[bool]
    """Per slot: whether the last capture into it covered the tensor."""
    is_live: bool = True
    """False: the owner dropped the tensor, but the slot that may be restored still has it."""


class Slots:
    """Two copies of the covered state, allocated once and laid out anew only when the structure changes.

    A tensor that appears later gets its value at that moment in both slots (its birth value); the slots' copies of
    the others are carried over bit for bit.
    """

    def __init__(self, device: torch.device, *, pinned: bool = False, on_device: bool = False) -> None:
        self.device = device
        self._arena_device = device if on_device else torch.device("cpu")
        self._pinned = pinned
        self.places: dict[Hashable, Place] = {}
        self.exempt: set[Hashable] = set()
        self.names: list[str] = []
        self.table = SnapshotTable((), device=device)
        self._arenas: tuple[Tensor, Tensor] | None = None
        self._seen: list[tuple[int, Hashable, torch.Size, bool]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of both slots."""
        return 0 if self._arenas is None else 2 * self._arenas[0].numel()

    def sync(self, tensors: list[TrackedTensor], zeroed: Iterable[Tensor] = ()) -> bool:
        """Bring the places in line with ``tensors``; True when something had changed.

        Raises:
            SnapshotError: a tensor cannot be copied byte by byte (sparse, quantized).
        """
        seen = [(t.tensor.data_ptr(), t.key, t.tensor.shape, t.watched) for t in tensors]
        if seen == self._seen:
            return False
        for tracked in tensors:
            if tracked.tensor.layout != torch.strided or tracked.tensor.is_quantized:
                raise SnapshotError(
                    f"{tracked.name}: expected a dense tensor, got layout {tracked.tensor.layout}; a snapshot copies bytes"
                )
        live = {t.key: (t, live_view(t.tensor)) for t in tensors}
        if self._same_layout(live):
            for key, (_, view) in live.items():
                self.places[key].live = view
        else:
            self._lay_out(live)
        for key, place in self.places.items():
            place.is_live = key in live
        self._seen = seen
        unwatched = {t.key for t in tensors if not t.watched}
        self._build_table(self.exempt | unwatched, zeroed)
        return True

    def _same_layout(self, live: dict[Hashable, tuple[TrackedTensor, Tensor]]) -> bool:
        return all(
            key in self.places
            and self.places[key].owner is tracked.owner
            and self.places[key].live.shape == view.shape
            and self.places[key].live.stride() == view.stride()
            and self.places[key].live.dtype == view.dtype
            for key, (tracked, view) in live.items()
        )

    def _lay_out(self, live: dict[Hashable, tuple[TrackedTensor, Tensor]]) -> None:
        old = self.places
        kept = {key: place for key, place in old.items() if key not in live and any(place.present)}
        wanted = {key: (t.name, t.kind, t.owner, view) for key, (t, view) in live.items()}
        wanted |= {key: (p.name, p.kind, p.owner, p.live) for key, p in kept.items()}
        offsets, total = {}, 0
        for key, (*_, view) in wanted.items():
            offsets[key] = total
            total += -(-view.numel() * view.element_size() // _ALIGN) * _ALIGN
        self._arenas = (self._arena(total), self._arena(total))
        self.places = {}
        for key, (name, kind, owner, view) in wanted.items():
            slots = (
                slot_view(self._arenas[0], offsets[key], view),
                slot_view(self._arenas[1], offsets[key], view),
            )
            before = old.get(key)
            same = before is not None and before.live.shape == view.shape and before.live.dtype == view.dtype
            for s in (0, 1):
                slots[s].copy_(before.slots[s] if same and before is not None else view)
            # Model tensors born later belong to both slots with their birth value; optimizer state does not.
            present = list(before.present) if same and before is not None else [kind in ("parameter", "buffer")] * 2
            self.places[key] = Place(name, kind, owner, view, slots, present)

    def _arena(self, nbytes: int) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._arena_device, pin_memory=self._pinned)
        except RuntimeError as error:
            raise SnapshotError(
                f"the snapshot slots need two buffers of {nbytes / 2**20:.1f} MiB "
                f"({'page-locked ' if self._pinned else ''}memory on {self._arena_device}), which could not be had: "
                f"{error}; use a smaller model or another GovernorConfig.storage"
            ) from error

    def _build_table(self, unsearched: set[Hashable], zeroed: Iterable[Tensor]) -> None:
        self.names = [place.name for place in self.places.values()]
        entries = [
            SnapshotEntry(
                place.live,
                place.slots,
                1 if place.kind in ("parameter", "optimizer") else 0,
                -1 if key in unsearched else index,
            )
            for index, (key, place) in enumerate(self.places.items())
            if place.is_live
        ]
        entries += [SnapshotEntry(live_view(t), None, 0, -1) for t in zeroed]
        self.table = SnapshotTable(entries, device=self.device)

    def mark_captured(self, slot: int) -> frozenset[Hashable]:
        """Note that slot now holds exactly the live tensors; returns their keys."""
        for place in self.places.values():
            place.present[slot] = place.is_live
        return frozenset(key for key, place in self.places.items() if place.is_live)

    def missing_live(self, slot: int) -> list[tuple[Hashable, Tensor]]:
        """Tensors that ``slot`` holds but whose owner dropped them, as fresh copies in the model's memory."""
        return [
            (key, place.slots[slot].to(self.device, copy=True))
            for key, place in self.places.items()
            if not place.is_live and place.present[slot]
        ]

    def forget_optimizer(self, index: int) -> None:
        """Drop the places of optimizer ``index`` and renumber those behind it."""
        renamed: dict[Hashable, Place] = {}
        for key, place in self.places.items():
            if isinstance(key, tuple) and key[0] in ("state", "group"):
                if key[1] == index:
                    continue
                if key[1] > index:
                    key = (key[0], key[1] - 1, *key[2:])
            renamed[key] = place
        self.places = renamed
        self._seen = []
