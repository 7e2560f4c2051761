"""Captures and restores that the host decides on: tensors and host-side parts together, or not at all."""

from __future__ import annotations

from collections.abc import Callable

from tolaria.errors import SnapshotError
from tolaria.snapshot.base import SnapshotBase
from tolaria.snapshot.host_state import HostState


class Transfer:
    """Copies a covered state to a slot, and puts it back with the host-side parts that belong to it.

    Ctrl-C inside :meth:`restore` is handed on once the restore is complete. What cannot be completed at once
    is remembered, see :attr:`is_unfinished`: whoever calls next restores once more.

    Args:
        base: what is covered, and its slots.
    """

    def __init__(self, base: SnapshotBase) -> None:
        self._base = base
        self._host: list[HostState | None] = [None, None]
        self.is_unfinished = False
        """Whether the last restore was interrupted."""

    def host(self, slot: int) -> HostState:
        """The host-side parts of the capture in ``slot``."""
        host = self._host[slot]
        assert host is not None, "a slot that may be restored has its host-side parts"
        return host

    def capture(self, slot: int, host: HostState, copy: Callable[[], None]) -> None:
        """Fill ``slot``, which nobody may restore meanwhile.

        Args:
            slot: 0 or 1.
            host: the host-side parts of now.
            copy: copies the tensors that the table names to it.
        """
        host.keys = self._base.slots.mark_captured(slot)
        self._host[slot] = host
        copy()

    def restore(self, slot: int, put_back: Callable[[], None], *, again: bool = False) -> None:
        """Put the capture in ``slot`` back, in place.

        Args:
            slot: 0 or 1.
            put_back: copies the tensors that the table names from it.
            again: the same restore once more, so with the same random numbers.

        Raises:
            SnapshotError: one part refused its state; everything else is back.
        """
        host = self.host(slot)
        counted = host.restores
        try:
            self._restore(slot, host, put_back, again=again)
        except Exception:
            raise
        except BaseException:
            # Whoever catches Ctrl-C often saves the model next. A second one leaves it to the next call.
            self._restore(slot, host, put_back, again=again or host.restores != counted)
            raise

    def _restore(self, slot: int, host: HostState, put_back: Callable[[], None], *, again: bool) -> None:
        base = self._base
        self.is_unfinished = True
        host.bring_back(base.covered)
        base.follow_structure(leave_out=True)
        structure = base.structure
        base.look_again()  # interrupted from here on, the next step or call acts
        base.recreate_missing(slot, host)
        kept = host.rates_to_keep(base.covered)
        put_back()
        base.slots.mark_written()
        try:
            host.load_into(base.covered, again=again, kept=kept)
        except SnapshotError:
            self.is_unfinished = False
            raise
        self.is_unfinished, base.structure = False, structure
        base.tell_left_out()
