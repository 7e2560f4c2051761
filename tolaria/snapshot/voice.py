"""Who speaks in a warning, and what it calls putting a capture back."""

from __future__ import annotations

from typing import NamedTuple


class Voice(NamedTuple):
    """The words of a warning that depend on who is asked to restore."""

    who: str
    restore: str


GOVERNOR = Voice("governor", "a rollback")
BY_HAND = Voice("Snapshot", "a restore")
