"""The double buffer: memory for two captures, and the table that says what lies where in it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria.errors import SnapshotError
from tolaria.ops import SnapshotEntry, SnapshotTable, live_view
from tolaria.ops.snapshot import PreparedRows
from tolaria.snapshot import magnitudes as sizes
from tolaria.snapshot.arena import Arena, Block, Segment
from tolaria.snapshot.covered import CoveredTensor
from tolaria.snapshot.memory import allocate
from tolaria.snapshot.place import (
    MemoryMap,
    Place,
    PlaceKey,
    fresh_copy,
    is_finite,
    place_key,
    write_birth_value,
)

_Live = dict[PlaceKey, tuple[CoveredTensor, Tensor]]
_Signature = list[tuple[object, ...]]


@dataclass(frozen=True, slots=True)
class _Layout:
    """All that the slots know, worked out beforehand and put in effect by one assignment."""

    arena: Arena
    rows: PreparedRows
    places: dict[PlaceKey, Place] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    seen: _Signature = field(default_factory=list)
    live_keys: frozenset[PlaceKey] = frozenset()
    held: tuple[frozenset[Hashable], frozenset[Hashable]] = (frozenset(), frozenset())
    """Per slot: what it holds, by its last capture or by birth (known on the CPU: the host decides)."""
    exempt: frozenset[Hashable] = frozenset()
    left_out: Mapping[str, str] = field(default_factory=dict)


class Slots:
    """Two copies of the covered state.

    Memory is taken once; growth adds to it, so that what a slot holds stays where it is, and a tensor that
    goes away leaves its room to the next ones. A tensor that appears later gets its value at that moment in
    both slots (its birth value), optimizer state what it was before the first step.

    Whatever raises inside :meth:`sync`, an interruption too, leaves places, table and slots as they were, and
    the tensors that the table points to alive.

    Args:
        device: where the live tensors are.
        storage: ``"pinned"`` or ``"device"``; on the CPU slots are ordinary memory either way.
        copies: 2, or 1: both slots are then the same memory, and a capture overwrites the one before.
        is_judged: whether a judge is to hear of tensors whose magnitude is suspicious.
    """

    def __init__(
        self, device: torch.device, storage: str = "pinned", copies: int = 2, *, is_judged: bool = False
    ) -> None:
        self.device = device
        self._storage = storage
        self._copies = copies
        self.table = SnapshotTable(device=device)
        # On CUDA work may be under way that was enqueued with addresses of long ago.
        self._layout = _Layout(Arena(keeps=device.type == "cuda"), self.table.prepare(()))
        self._forgotten: frozenset[PlaceKey] = frozenset()
        self._told: set[str] = set()
        self._is_judged = is_judged
        self._births = count(1)

    @property
    def places(self) -> Mapping[PlaceKey, Place]:
        """Every tensor that is live or that a slot may hold."""
        return self._layout.places

    @property
    def names(self) -> tuple[str, ...]:
        """Name by report index, which a place keeps while it exists."""
        return self._layout.names

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._copies * self._layout.arena.nbytes

    @property
    def segments(self) -> list[Tensor]:
        """The memory of both slots, as it was taken."""
        return [memory for segment in self._layout.arena.segments for memory in segment.memory]

    @property
    def exempt(self) -> frozenset[Hashable]:
        """Keys of the tensors that are copied but not searched."""
        return self._layout.exempt

    @exempt.setter
    def exempt(self, keys: Iterable[Hashable]) -> None:
        self._layout = replace(self._layout, exempt=frozenset(keys))

    @property
    def left_out(self) -> Mapping[str, str]:
        """Live tensors that the last :meth:`sync` had to leave out, by name, and why."""
        return self._layout.left_out

    def check_whole(self) -> None:
        """Refuse a capture that would not cover everything.

        Raises:
            SnapshotError: the last :meth:`sync` left a tensor out.
        """
        self._told |= self.left_out.keys()
        _refuse(self.left_out)

    def untold(self, tensors: Sequence[CoveredTensor]) -> dict[str, str]:
        """Those of ``tensors`` that cannot be covered and that nobody has named before, and why."""
        new = {name: why for name, why in _views(tensors)[1].items() if name not in self._told}
        self._told |= new.keys()
        return new

    def is_current(self, tensors: Sequence[CoveredTensor]) -> bool:
        """Whether these are the tensors that the table points to."""
        live, refused = _views(tensors)
        return not refused and self._points_to(live)

    def _points_to(self, live: _Live) -> bool:
        whole = self.table.holds(self._layout.rows) and not self._forgotten
        return whole and _signature(live) == self._layout.seen

    def sync(self, tensors: Sequence[CoveredTensor], *, leave_out: bool = False) -> bool:
        """Bring the places in line with ``tensors``; True when something had changed.

        Args:
            tensors: everything that is to be covered.
            leave_out: go without those that cannot be, for a restore, which knows nothing of them anyway;
                see :attr:`left_out`.

        Raises:
            SnapshotError: a tensor cannot be copied byte by byte, or memory ran out; nothing has changed
                then.
        """
        live, refused = _views(tensors)
        if not leave_out:
            self._told |= refused.keys()
            _refuse(refused)
        if self._points_to(live):
            self._layout = replace(self._layout, left_out=refused)
            return False
        layout = self._planned(live, refused)
        self.table.adopt(layout.rows)
        self._layout = layout
        self._forgotten = frozenset()
        return True

    def _planned(self, live: _Live, refused: Mapping[str, str]) -> _Layout:
        """The layout for these tensors; writes to no memory that the present one gives a meaning to."""
        former = self._layout
        held = [keys - self._forgotten for keys in former.held]
        kept: dict[PlaceKey, Place] = {}
        idle: list[Block] = []
        dropped: list[Block] = []
        for key, place in former.places.items():
            if key not in self._forgotten and (key in live or key in held[0] or key in held[1]):
                tracked, view = live.get(key, (None, place.live))
                name = place.name if tracked is None else tracked.name
                kept[key] = replace(place, name=name, live=view, is_live=key in live)
            else:  # the table still points to those that were live
                (dropped if key in former.live_keys else idle).append(place.block)
        born = [key for key in live if key not in kept]
        sizes = [live[key][1].numel() * live[key][1].element_size() for key in born]
        arena, blocks = former.arena.give(idle).take(sizes, self._new_segment)
        numbers = _free_numbers(kept.values())
        places = kept | {
            key: Place.of(*live[key], block, next(numbers), next(self._births))
            for key, block in zip(born, blocks, strict=True)
        }
        self._give_birth(live, places, held)
        exempt = former.exempt | self._exempt_from_birth(live)
        return _Layout(
            arena.give(dropped),
            self.table.prepare([self._entry(places[key], live[key][0], exempt) for key in live]),
            places,
            _names(places.values()),
            _signature(live),
            frozenset(live),
            (frozenset(held[0]), frozenset(held[1])),
            exempt,
            dict(refused),
        )

    def _entry(self, place: Place, covered: CoveredTensor, exempt: frozenset[Hashable]) -> SnapshotEntry:
        index = place.number if covered.watched and covered.key not in exempt else -1
        has_size = self._is_judged and index >= 0 and covered.kind in ("parameter", "buffer")
        birth = place.birth if has_size else 0
        return SnapshotEntry(place.live, place.slots, covered.part, index, covered.zeroed, birth)

    def _new_segment(self, nbytes: int) -> Segment:
        taken = [allocate(nbytes, self.device, self._storage) for _ in range(self._copies)]
        return Segment((taken[0], taken[-1]))

    def _give_birth(
        self, live: _Live, places: Mapping[PlaceKey, Place], held: list[frozenset[Hashable]]
    ) -> None:
        """Fill the slots of what was not there before, or comes back after captures that went without it.

        Model tensors born later belong to both slots from then on; other state does not.
        """
        former = self._layout
        memory: MemoryMap | None = None
        for key in (key for key in live if key not in former.live_keys or key in self._forgotten):
            covered, slots = live[key][0], [slot for slot in range(self._copies) if key not in held[slot]]
            if not slots:
                continue
            write_birth_value(covered, places[key], slots)
            if covered.kind != "optimizer" and not covered.zeroed:
                memory = memory or MemoryMap(former.places[k] for k in former.live_keys)
                memory.inherit(places[key], slots)
        joining = frozenset(key for key in live if live[key][0].kind in ("parameter", "buffer"))
        held[:] = [keys | (joining - former.live_keys) for keys in held]

    def _exempt_from_birth(self, live: _Live) -> frozenset[Hashable]:
        """Masks that join later are judged by their birth value, as those present at attach."""
        if not self.places:
            return frozenset()
        known = {place.key for place in self.places.values()}
        joining = [t for t, _ in live.values() if t.kind == "buffer" and t.key not in known]
        return frozenset(t.key for t in joining if not is_finite(t.tensor))

    def mark_captured(self, slot: int) -> frozenset[PlaceKey]:
        """Note that slot now holds exactly the live tensors; returns their keys."""
        keys, (first, second) = self._layout.live_keys, self._layout.held
        if self._copies == 1:
            first = second = keys
        self._layout = replace(self._layout, held=(first, keys) if slot else (keys, second))
        return keys

    def keep(self, keys: frozenset[Hashable]) -> None:
        """Note that either slot may hold the tensors of ``keys``, and of no others that are gone."""
        self._layout = replace(self._layout, held=(keys, keys))

    def live_keys(self) -> frozenset[PlaceKey]:
        """Keys of the tensors that a capture covers now."""
        return self._layout.live_keys

    def mark_written(self) -> None:
        """Tell autograd that every live tensor was written to, which the compiled restore does not.

        A backward through a forward from before then raises, as after any other change in place.
        """
        live = (place.live for place in self.places.values() if place.is_live)
        torch.autograd.graph.increment_version([view for view in live if not view.is_inference()])

    def missing_live(self, slot: int, keys: frozenset[Hashable]) -> list[tuple[Hashable, object, Tensor]]:
        """Tensors of ``keys`` that ``slot`` holds but their owner dropped.

        Returns:
            Of each the key, its anchor (see :class:`CoveredTensor`), and a fresh copy on its device.
        """
        gone = [(key, place) for key, place in self.places.items() if not place.is_live and key in keys]
        return [(place.key, place.anchor, fresh_copy(key, place, slot)) for key, place in gone]

    def magnitudes(self, good: sizes.Promoted) -> sizes.Magnitudes:
        """How large each live tensor was in promoted captures; as :func:`magnitudes.read`."""
        table = self.table.magnitudes
        return {} if table is None else sizes.read(table, self.places.values(), good)

    def take_magnitudes(self, known: sizes.Magnitudes) -> None:
        """Go on from what another's slots knew."""
        if self.table.magnitudes is not None:
            sizes.write_(self.table.magnitudes, self.places.values(), known)

    def forget_optimizer(self, optimizer: Optimizer) -> None:
        """Drop the places of its state and its hyper-parameters, with the next :meth:`sync`."""
        theirs = ("state", id(optimizer)), ("group", id(optimizer))
        self._forgotten |= {
            key for key, p in self.places.items() if isinstance(p.key, tuple) and p.key[:2] in theirs
        }


def check_coverable(tensors: Sequence[CoveredTensor]) -> None:
    """Refuse what cannot be copied byte by byte.

    Raises:
        SnapshotError: it names the tensor.
    """
    _refuse(_views(tensors)[1])


def _refuse(refused: Mapping[str, str]) -> None:
    for name, why in refused.items():
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise SnapshotError(f"{name}{more}: {why}")


def _views(tensors: Sequence[CoveredTensor]) -> tuple[_Live, dict[str, str]]:
    """What can be covered, by its place, and the names of what cannot, with the reason."""
    live: _Live = {}
    refused: dict[str, str] = {}
    for covered in tensors:
        try:
            view = live_view(covered.tensor)
        except SnapshotError as error:
            refused[covered.name] = str(error)
        else:
            live[place_key(covered)] = covered, view
    return live, refused


def _signature(live: _Live) -> _Signature:
    return [(view.data_ptr(), key, t.watched, t.zeroed, t.part) for key, (t, view) in live.items()]


def _free_numbers(places: Iterable[Place]) -> Iterator[int]:
    """Report indices that none of ``places`` has, smallest first."""
    taken = {place.number for place in places}
    return (number for number in count() if number not in taken)


def _names(places: Iterable[Place]) -> tuple[str, ...]:
    by_number = {place.number: place.name for place in places}
    return tuple(by_number.get(number, "") for number in range(max(by_number, default=-1) + 1))
