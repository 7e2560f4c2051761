"""One governed model on CUDA, where the device decides and the host enqueues the same work whatever happens.

Every step the host launches the restore, which returns at once unless the judge ordered one, and, when a
capture may be due, the two capture launches: what anybody may change next (buffers, scaler, rates, alpha) on
the current stream, and parameters with optimizer state on a side stream, under the next forward and backward.
Nothing is read back: the host learns of rollbacks from the mailbox's status words, and puts the host-side
parts back then. Which parts those are, the device says: a capture carries the ticket of its launch
(:mod:`tolaria.snapshot.host_parts`). The host counts the judgements that it really enqueued only to know when
a capture may be due.

Who must wait for a capture in flight: the optimizer (its step pre-hook does), the judge and the restore
(``judging`` does), ``load_state_dict`` of any module, a structure change (``sync_structure`` does). Each
waits for itself and nobody clears the event for others. Memory that a launch may still touch is not given
back before it is done: not to another stream when a tensor is replaced (``record_stream``), not to the system
when the governor goes (``let_go``). What a recorded graph holds the address of outlives the governor
(:mod:`tolaria.snapshot.graphs`); the replays then find a judge without slots, and a table without rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.governor.device_end import let_go
from tolaria.governor.engine import Engine
from tolaria.governor.extra_search import flag_bad_extras
from tolaria.governor.row import Row
from tolaria.governor.seed_flags import SeedFlags
from tolaria.ops import Order, PanicReason, StateField, StatusField
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.flight import Flight, LoadHooks, before_optimizer_step
from tolaria.snapshot.host_parts import HostParts
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.optimizer_state import HostValues
from tolaria.telemetry.events import CaptureEvent, GovernorEvent, SeedCulledEvent


class DeviceEngine(Engine):
    """Snapshots and rollbacks of a model on one CUDA device; arguments as for :class:`Engine`."""

    is_late = True

    def __init__(self, row: Row, covered: CoveredState) -> None:
        graphs.catch_up()
        self._flight = Flight(covered.device)
        self._handles: list[RemovableHandle] = []
        self._load_hooks = LoadHooks(self._flight, self._handles)
        self._parts = HostParts()
        self._judged = self._next = 0
        self._maybe_judged = self._heard_step = 0
        self._known_rollbacks = 0
        self._seed_flags = SeedFlags(covered.device)
        self._moved: list[Optimizer] = []
        self._is_judging = self._is_acting = self._is_restoring = False
        super().__init__(row, covered)
        memory = (self.slots, row.settings, row.mailbox, self._seed_flags)
        self._finalizer = weakref.finalize(
            self, let_go, self._flight, self._handles, row.state, row.column, self.slots.table, memory
        )
        try:
            with torch.cuda.device(covered.device):
                self.adopt_current_state()
            for optimizer in covered.optimizers:
                self.hook(optimizer)
        except BaseException:
            self.close()
            raise

    def hook(self, optimizer: Optimizer) -> None:
        """Make ``optimizer`` wait for a capture in flight before it changes what is being captured."""
        super().hook(optimizer)
        # The hooks know the flight alone: an optimizer that lives on must not keep the engine and its slots.
        handle = optimizer.register_step_pre_hook(partial(before_optimizer_step, self._flight))
        self._handles += [handle, optimizer.register_load_state_dict_post_hook(self._moved.append)]

    def wait(self) -> None:
        """Make the current stream wait for a capture in flight; a recorded one has its wait recorded too."""
        self._flight.wait()

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        torch.cuda.current_stream(self.covered.device).synchronize()  # sync: asked for by name
        self._flight.stream.synchronize()

    def close(self) -> None:
        """Remove the hooks, wait for a capture in flight and give the memory back."""
        super().close()
        self._finalizer()

    # -- every step ------------------------------------------------------------------------------------------

    def is_recording(self) -> bool:
        """Whether a CUDA graph is being recorded on the current stream."""
        return graphs.is_recording(self.covered.device)

    def judging(self) -> None:
        """A judgement is about to be enqueued: it must see a finished capture."""
        if self.is_recording():
            self._check_recordable()
            self._outlive()
        else:
            graphs.catch_up()
        self.wait()
        step = self.step_count
        if step != self._heard_step:
            self._heard_step, self._maybe_judged = step, 0
        self._maybe_judged += self._is_judging  # the last call was refused, or interrupted: before, or after
        self._is_judging = not self.is_recording()
        self._judged = max(self._judged, step)
        self._next = self._judged + 1

    def judged(self, *, surely: bool = True) -> None:
        """A judgement was enqueued. One that was recorded has not happened; its replays are heard of."""
        if self.is_recording():
            return
        self._is_judging = False
        if surely:
            self._judged = self._next
        else:
            self._maybe_judged += 1

    def act(self) -> None:
        """Enqueue the restore, and the captures if one may be due."""
        number = graphs.recording(self.covered.device)
        if number:
            self._launch_restore()
            if self._flight.recorded_in(number) is None:
                self._capture_here()
            return
        self.complete_restore()
        self._is_acting = True
        self.follow_structure(leave_out=True)
        self._launch_restore()
        if self._may_be_due() and not self._row.config.log_only:
            self._reconcile_if_heard()
            self._capture_aside(self.host_parts())
        if self.seed_holders:
            self._check_seeds()

    def finished(self) -> None:
        """The step that :meth:`act` belongs to has come to its end, without an exception."""
        self._is_acting = False

    def _may_be_due(self) -> bool:
        last = self._judged + self._maybe_judged
        return last - self._row.status(StatusField.due_from) >= self._row.config.snapshot_interval

    def begin_step(self) -> None:
        """Head of a recorded step: capture what the step before ordered, beside the forward and backward."""
        if not self.is_recording():
            return
        self._check_recordable()
        self._outlive()
        self._fork(self._flight.begin_recorded(), 0)

    def _outlive(self) -> None:
        graphs.outlive(self._row.state, self._row.settings, self._row.mailbox, *self.slots.table.memory)
        graphs.outlive(*self.peers.states())

    def _launch_restore(self) -> None:
        self._put_back(self._row.state, self._row.mailbox)

    def _put_back(self, state: Tensor, mailbox: Tensor | None) -> None:
        ordered = self.peers.ordered(state) if self.peers else None
        ops.snapshot_restore_(state, self._row.column, self._row.settings, self.slots.table, mailbox)
        if ordered is not None:
            self.peers.restored(ordered)

    def last_good(self) -> tuple[int, HostState]:
        """The slot of the last known good capture, and its host-side parts; waits for the device."""
        self.synchronize()
        slot = int(self._row.state[StateField.last_good, self._row.column])  # sync: asked for by name
        return slot, self._parts.of(*self._last_good_capture())

    def _last_good_capture(self) -> tuple[int, int]:
        status = self._row.status
        return status(StatusField.last_good_capture), status(StatusField.last_good_ticket)

    def _fork(self, flight: Flight, ticket: int) -> None:
        current = torch.cuda.current_stream(self.covered.device)
        arguments = self._row.state, self._row.column, self.slots.table
        ops.snapshot_capture_(*arguments, 0, self._row.mailbox, ticket)
        flight.ready.record(current)
        flight.stream.wait_event(flight.ready)
        flight.launching()
        with torch.cuda.stream(flight.stream):
            # Slots on the device are filled at its own speed, in no time; others at the speed of the bus.
            beside = self._row.config.storage != "device"
            ops.snapshot_capture_(*arguments, 1, self._row.mailbox, ticket, aside=beside)
        flight.launched()

    def _capture_aside(self, host: HostState) -> None:
        """Launch the captures of a state whose host-side parts, which may refuse to be told, are ``host``."""
        ticket = self._keep(host)
        flag_bad_extras(self._row, self, host, self.number_of_host_part)
        self._fork(self._flight, ticket)

    def _capture_here(self, ticket: int = 0) -> None:
        row = self._row
        for part in (0, 1):
            ops.snapshot_capture_(row.state, row.column, self.slots.table, part, row.mailbox, ticket)

    def _keep(self, host: HostState) -> int:
        """File ``host`` for a capture about to be launched, and let go of what cannot come back any more."""
        self.wait_for_reader()
        host.keys = self.slots.live_keys()
        good = self._last_good_capture()
        # Read behind them: a rollback to an older capture that nobody has followed yet may still need it.
        if self._row.status(StatusField.rollback_count) == self._known_rollbacks:
            self._parts.confirm(*good)
        return self._parts.issue(host, self._judged)

    def learn(self, events: Sequence[GovernorEvent]) -> None:
        """Keep the host-side parts of captures that graph replays made, which no Python code saw."""

        def of_now() -> HostState:
            host = HostState.of(self.covered)
            host.keys = self.slots.live_keys()
            return host

        for event in events:
            if isinstance(event, CaptureEvent):
                self._parts.heard(event.capture_id, event.ticket, event.capture_step, of_now)

    @property
    def enqueued_step(self) -> int:
        """Judgements that were enqueued so far; replays of a graph count once their status has arrived."""
        return max(self._judged, self.step_count)

    def correct_host_values(self, optimizer: Optimizer, right: HostValues) -> None:
        """The captures after a step that turned out to be skipped keep these host-side values instead."""
        self._parts.correct(optimizer, right)

    # -- structure -------------------------------------------------------------------------------------------

    def may_have_moved(self) -> bool:
        """As the base class; an optimizer that has loaded a state may have, too."""
        moved, self._moved[:] = bool(self._moved), []
        return moved or super().may_have_moved()

    def sync_structure(self, *, leave_out: bool = False) -> None:
        """As the base class; the device is done with the old table before it is changed."""
        if self.is_recording():
            raise self._not_recordable("its structure changed since the last eager step")
        self.wait()
        # First: interrupted behind the look, nothing would seem to have changed.
        self._load_hooks.cover(module for *_, module in self.covered.walk().modules)
        self._note_streams([*(place.live for place in self.slots.places.values()), *self.slots.table.memory])
        self.slots.keep(self._parts.keys())
        super().sync_structure(leave_out=leave_out)
        self._note_streams(self.slots.table.memory)

    def _note_streams(self, tensors: list[Tensor]) -> None:
        """Once let go, they may be used by launches on streams that their allocator knows nothing of."""
        for tensor in tensors:
            for stream in (self._flight.stream, torch.cuda.current_stream(self.covered.device)):
                tensor.record_stream(stream)

    def _check_recordable(self) -> None:
        if self._watch.has_moved() and not self.slots.is_current(self.covered.tensors()):
            raise self._not_recordable("its structure changed since the last eager step")
        for i, optimizer in enumerate(self.covered.optimizers):
            for group in optimizer.param_groups:
                if group.get("capturable", True) is False:
                    raise self._not_recordable(
                        f"optimizers[{i}] ({type(optimizer).__name__}) keeps its step on the host: "
                        "make it with capturable=True"
                    )

    @staticmethod
    def _not_recordable(why: str) -> TolariaError:
        return TolariaError(
            f"governor: the guarded step cannot be recorded in a CUDA graph: {why}; run a few eager steps "
            "with governor.step first, then record"
        )

    # -- by hand and reconciliation --------------------------------------------------------------------------

    def snapshot(self) -> None:
        """Capture now, by hand."""
        self.complete_restore()
        self._reconcile_if_heard()
        self.follow_structure()
        host = self.host_parts()
        self.order(Order.CAPTURE)
        self._judged = max(self._judged, self.step_count)
        self._capture_aside(host)

    def restore(self) -> None:
        """Enqueue a restore whose order was given by hand."""
        self.wait()
        self.follow_structure(leave_out=True)
        self._is_restoring = True
        self._launch_restore()
        self.slots.mark_written()

    def restore_again(self) -> None:
        """Put back once more, uncounted, what the last rollback put back: it may have changed since."""
        self.wait()
        self.follow_structure(leave_out=True)
        self._is_restoring = True
        self._put_back(self._row.state_with_order(), None)
        self.slots.mark_written()
        self._reconcile(again=True)  # the host-side parts once more, too

    def complete_restore(self) -> None:
        """Complete a restore whose call was interrupted: once more, wholly. Then it waits for the device."""
        if not (self._is_acting or self._is_restoring):
            return
        self.synchronize()  # sync: after an interruption
        if self._is_restoring or self.is_behind():
            self.restore_again()
            self.has_restored_again = True
        self._is_acting = False

    def order(self, order: Order, reason: PanicReason = PanicReason.MANUAL, tensor: int = -1) -> None:
        """Give an order from outside the rule."""
        self.wait()
        super().order(order, reason, tensor)

    def _capture_and_promote(self, host: HostState) -> None:
        ticket = self._keep(host)
        self.order(Order.CAPTURE)
        self._capture_here(ticket)
        self.order(Order.PROMOTE)
        self.synchronize()
        self._parts.forget_others(ticket)
        self._judged, self._known_rollbacks = self.step_count, self._row.status(StatusField.rollback_count)

    def is_behind(self) -> bool:
        """Whether the device has rolled back since the last :meth:`reconcile`."""
        return self._row.status(StatusField.rollback_count) != self._known_rollbacks

    def reconcile(self) -> None:
        """Put host-side parts back if the device has rolled back since the last look. Plain loads alone."""
        if self.is_behind() and not self.is_recording():
            self._reconcile(again=False)

    def _reconcile_if_heard(self) -> None:
        """Before a capture: it must not keep host-side parts that a rollback is known to have undone."""
        if self._row.status(StatusField.restored_ticket):  # of a replay's capture :meth:`learn` hears first
            self.reconcile()

    def _reconcile(self, *, again: bool) -> None:
        count, capture, ticket = self._last_rollback()
        if again:  # after an interruption maybe a later one
            capture, ticket = self._last_good_capture()
        self._is_restoring = True
        host = self._parts.of(capture, ticket)
        host.bring_back(self.covered)
        missing = [key for key, place in self.slots.places.items() if not place.is_live and key in host.keys]
        if missing:
            # sync: state was cleared by hand, rare
            slot = int(self._row.state[StateField.last_good, self._row.column])
            self.recreate_missing(slot, host)
        try:
            host.load_into(self.covered, keep_fresh=True, again=again)
        except Exception:
            self._known_rollbacks, self._is_restoring = count, False  # one refused; everything else is back
            raise
        self._known_rollbacks, self._is_restoring = count, False
        self.tell_left_out()

    def _last_rollback(self) -> tuple[int, int, int]:
        """Rollbacks so far, and the capture and ticket of the last: words that belong together."""
        status = self._row.status
        while True:
            count = status(StatusField.rollback_count)
            restored = status(StatusField.restored_capture), status(StatusField.restored_ticket)
            if status(StatusField.rollback_count) == count:
                return count, *restored

    # -- seeds -----------------------------------------------------------------------------------------------

    def _check_seeds(self) -> None:
        """Search incubating seeds on the device now and then; cull the one whose flag has arrived."""
        interval = self._row.config.seed_check_interval
        for name, holder in self.seed_holders:
            tensors = holder.incubating_tensors()
            if self._seed_flags.found(name, tensors):
                self.covered.retire(tensors)
                holder.cull()
                self.untold.append(SeedCulledEvent(step=self.step_count, row=self._row.column, name=name))
            elif tensors and interval and self._judged % interval == 0:
                self._seed_flags.search(name, tensors)
