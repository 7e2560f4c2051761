"""One governed model in CPU memory, where the host sees the judge's orders at once and carries them out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.engine import Engine
from tolaria.governor.row import Row
from tolaria.ops import Order, PanicReason, StateField
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.transfer import Transfer

_YES = torch.ones((), dtype=torch.float64, device="cpu")


class HostEngine(Engine):
    """Snapshots and rollbacks of a model in CPU memory; arguments as for :class:`Engine`."""

    def __init__(self, row: Row, covered: CoveredState) -> None:
        super().__init__(row, covered)
        self._view: npt.NDArray[np.float64] = row.state.numpy()[:, row.column]
        self._transfer = Transfer(self)
        self.adopt_current_state()
        for optimizer in covered.optimizers:
            self.hook(optimizer)

    def act(self) -> None:
        """Carry out what the last judgement ordered."""
        if self._view[StateField.restore_order]:
            self.restore()
        else:
            self.complete_restore()
            self._capture_if_ordered()
        if self.seed_holders and self.seeds_are_due():
            self.cull_poisoned_seeds()

    def _capture_if_ordered(self) -> None:
        if self._view[StateField.capture_order_0] >= 0:
            self.cull_poisoned_seeds()
            self.follow_structure()
            self._capture(self.host_parts())
        elif self.covered.structure() != self.structure:
            self.sync_structure()

    def snapshot(self) -> None:
        """Capture now, by hand."""
        self.complete_restore()
        self.cull_poisoned_seeds()
        self.follow_structure()
        host = self.host_parts()
        self.order(Order.CAPTURE)
        self._capture(host)

    def _capture(self, host: HostState) -> None:
        """Copy the state to the ordered slot. A non-finite value on the way is a panic and rolls back."""
        self._copy_to_slot(host)
        bad = int(self._view[StateField.candidate_bad])
        if bad >= 0 and not self.defer_panics and not self._row.config.log_only:
            self.order(Order.ROLLBACK, PanicReason.NON_FINITE_STATE, bad)
            self.restore()

    def _copy_to_slot(self, host: HostState) -> None:
        slot = int(self._view[StateField.capture_order_0])
        bad = self.bad_host_part(host)
        self.wait_for_reader(slot)
        self._transfer.capture(slot, host, self._copy)
        if bad is not None:
            self._view[StateField.candidate_bad] = self.number_of_host_part(bad)

    def _copy(self) -> None:
        row = self._row
        for part in (0, 1):
            ops.snapshot_capture_(row.state, row.column, self.slots.table, part, row.mailbox)

    def restore(self) -> None:
        """Put the last known good state back, in place; the order must have been given."""
        self._put_back(self._row.state, self._row.mailbox)

    def restore_again(self) -> None:
        """Put back once more, uncounted, what the last rollback put back: it may have changed since."""
        self._put_back(self._row.state_with_order(), None, again=True)

    def _put_back(self, state: Tensor, mailbox: Tensor | None, *, again: bool = False) -> None:
        row, table = self._row, self.slots.table

        def put_back() -> None:
            ops.snapshot_restore_(state, row.column, row.settings, table, mailbox)
            self.peers.restored(_YES)

        self._transfer.restore(int(self._view[StateField.last_good]), put_back, again=again)
        self.look_again()  # the next step acts: it does what is left if this one is interrupted from here on

    def last_good(self) -> tuple[int, HostState]:
        """The slot of the last known good capture, and its host-side parts."""
        slot = int(self._view[StateField.last_good])
        return slot, self._transfer.host(slot)

    def complete_restore(self) -> None:
        """Complete a restore that an exception or Ctrl-C left half done: all of it once more."""
        if self._transfer.is_unfinished:
            self.restore_again()
            self.has_restored_again = True

    def _capture_and_promote(self, host: HostState) -> None:
        self.order(Order.CAPTURE)
        self._copy_to_slot(host)
        self.order(Order.PROMOTE)
