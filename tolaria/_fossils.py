"""Who hears of seeds that have become part of their network, without either side knowing the other."""

from __future__ import annotations

import weakref
from typing import Protocol


class HearsOfFossils(Protocol):
    """Wants to know when a seed becomes part of a network for good."""

    def fossilized(self, slot: object, /) -> None:
        """It just did, in ``slot``, which may belong to any model."""
        ...


_LISTENERS: weakref.WeakSet[HearsOfFossils] = weakref.WeakSet()


def listen(listener: HearsOfFossils) -> None:
    """Tell ``listener`` of fossils as long as it lives."""
    _LISTENERS.add(listener)


def tell_fossilized(slot: object) -> None:
    """A seed in ``slot`` has become part of its network."""
    for listener in list(_LISTENERS):
        listener.fossilized(slot)
