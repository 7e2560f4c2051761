"""One governed model on CUDA, where the device decides and the host enqueues the same work whatever happens.

Every step the host launches the restore, which returns at once unless the judge ordered one, and, when a
capture may be due, the two capture launches: what anybody may change next (buffers, scaler, rates, alpha) on
the current stream, and parameters with optimizer state on a side stream, under the next forward and backward.
Nothing is read back: the host learns of rollbacks from the mailbox's status words, and puts the host-side
parts back then.

Who must wait for a capture in flight: the optimizer (its step pre-hook does), the judge and the restore
(``act`` does), a structure change (``sync_structure`` does). Each waits for itself and nobody clears the
event for others. Memory that a launch may still touch is not given back before it is done: not to another
stream when a tensor is replaced (``record_stream``), not to the system when the governor goes (``_let_go``).
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.governor.config import GovernorConfig
from tolaria.governor.engine import Engine
from tolaria.governor.events import CaptureEvent, GovernorEvent, MailboxReader, SeedCulledEvent
from tolaria.governor.host_state import HostState, HostValues
from tolaria.governor.memory import allocate
from tolaria.governor.tracked import TrackedState
from tolaria.ops import Order, PanicReason, StateField, StatusField


class _Flight:
    """The capture that may be in flight on the side stream, and who has waited for it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.started = False
        self.users: dict[int, torch.cuda.Stream] = {}
        """Every stream that this governor's own launches went to."""
        self._waited: set[int] = set()
        self.recorded: _Flight | None = None
        """The capture at the head of the CUDA graph that is being recorded."""

    def launched(self) -> None:
        self.done.record(self.stream)
        self.started = True
        self._waited.clear()

    def join(self) -> None:
        """Make the current stream wait for the capture, once a stream."""
        stream = torch.cuda.current_stream(self.stream.device)
        self.users[stream.cuda_stream] = stream
        if self.started and stream.cuda_stream not in self._waited:
            stream.wait_event(self.done)
            self._waited.add(stream.cuda_stream)

    def wait(self) -> None:
        """Join; while a graph is being recorded, join the capture at its head, if there is one."""
        if not torch.cuda.is_current_stream_capturing():
            self.join()
        elif self.recorded is not None:
            self.recorded.join()


class DeviceEngine(Engine):
    """Snapshots and rollbacks of a model on one CUDA device; arguments as for :class:`Engine`."""

    def __init__(
        self,
        column: int,
        state: Tensor,
        config: GovernorConfig,
        settings: Tensor,
        mailbox: Tensor,
        reader: MailboxReader,
        tracked: TrackedState,
    ) -> None:
        self._flight = _Flight(tracked.device)
        self._handles: list[RemovableHandle] = []
        self._host: dict[int, HostState] = {}
        self._judged = 0
        self._known_rollbacks = 0
        self._seed_flags: dict[str, tuple[Tensor, list[Tensor]]] = {}
        self._moved: list[Optimizer] = []
        super().__init__(column, state, config, settings, mailbox, reader, tracked)
        with torch.cuda.device(tracked.device):
            self.adopt_current_state()
        for optimizer in tracked.optimizers:
            self.hook(optimizer)
        waiting = _BeforeLoading(self._flight)
        loading = tracked.model.register_load_state_dict_pre_hook(waiting)  # type: ignore[no-untyped-call]
        self._handles.append(loading)
        memory = (self.slots, self._state, self._settings, mailbox)
        self._finalizer = weakref.finalize(self, _let_go, self._flight, self._handles, memory)

    def hook(self, optimizer: Optimizer) -> None:
        """Make ``optimizer`` wait for a capture in flight before it changes what is being captured."""
        # The hooks know the flight alone: an optimizer that lives on must not keep the engine and its slots.
        handle = optimizer.register_step_pre_hook(partial(_before_optimizer_step, self._flight))
        self._handles += [handle, optimizer.register_load_state_dict_post_hook(self._moved.append)]

    def wait(self) -> None:
        """Make the current stream wait for a capture in flight; a recorded one has its wait recorded too."""
        self._flight.wait()

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        torch.cuda.current_stream(self.tracked.device).synchronize()  # sync: asked for by name
        self._flight.stream.synchronize()

    def close(self) -> None:
        """Remove the hooks, wait for a capture in flight and give the memory back."""
        self._finalizer()

    # -- every step ------------------------------------------------------------------------------------------

    def judged(self) -> None:
        """A judgement is about to be enqueued: it must see a finished capture."""
        self.wait()
        self._judged = max(self._judged, self.step_count) + 1

    def act(self) -> Iterator[GovernorEvent]:
        """Enqueue the restore, and the captures if one may be due."""
        if torch.cuda.is_current_stream_capturing():
            self._check_recordable()
            self._launch_restore()
            if self._flight.recorded is None:
                self._capture_here()
            self._flight.recorded = None
            return
        if self._structure_moved():
            yield from self.sync_structure(leave_out=True)
        self._launch_restore()
        due = self._judged - self._reader.status(StatusField.anchor_step) >= self._config.snapshot_interval
        if due and not self._config.log_only:
            self._capture_aside()
        if self.seed_holders:
            yield from self._check_seeds()

    def begin_step(self) -> None:
        """Head of a recorded step: capture what the step before ordered, beside the forward and backward."""
        if not torch.cuda.is_current_stream_capturing():
            return
        self._check_recordable()
        self._flight.recorded = _Flight(self.tracked.device)
        self._fork(self._flight.recorded)

    def _launch_restore(self) -> None:
        ops.snapshot_restore_(self._state, self._column, self._settings, self.slots.table, self._mailbox)

    def _fork(self, flight: _Flight) -> None:
        current = torch.cuda.current_stream(self.tracked.device)
        table = self.slots.table
        ops.snapshot_capture_(self._state, self._column, table, 0, self._mailbox)
        flight.ready.record(current)
        flight.stream.wait_event(flight.ready)
        with torch.cuda.stream(flight.stream):
            ops.snapshot_capture_(self._state, self._column, table, 1, self._mailbox)
        flight.launched()

    def _capture_aside(self) -> None:
        self.slots.check_whole()
        host = HostState.of(self.tracked)  # first: what cannot say its state must not leave half a capture
        self._fork(self._flight)
        self._keep_host_state(host, self._judged)

    def _capture_here(self) -> None:
        for part in (0, 1):
            ops.snapshot_capture_(self._state, self._column, self.slots.table, part, self._mailbox)

    def _keep_host_state(self, host: HostState, captured_step: int) -> None:
        host.keys = self.slots.live_keys()
        self._host[captured_step] = host
        good = self._reader.status(StatusField.last_good_step)
        for step in [s for s in self._host if s < good]:
            if any(step < other <= good for other in self._host):
                del self._host[step]

    def learn(self, events: Sequence[GovernorEvent]) -> None:
        """Keep the host-side parts of captures that graph replays made, which no Python code saw."""
        for event in events:
            if isinstance(event, CaptureEvent) and event.capture_step > max(self._host):
                self._judged = max(self._judged, event.capture_step)
                self._keep_host_state(HostState.of(self.tracked), event.capture_step)

    @property
    def enqueued_step(self) -> int:
        """Judgements that were enqueued so far; replays of a graph count once their status has arrived."""
        return self._judged

    def correct_host_values(self, optimizer: Optimizer, right: HostValues) -> None:
        """The captures after a step that turned out to be skipped keep these host-side values instead."""
        for step, values in list(right.items())[1:]:
            for host in self._host[step].optimizers if step in self._host else ():
                if host.optimizer is optimizer:
                    host.values = values

    # -- structure -------------------------------------------------------------------------------------------

    def _structure_moved(self) -> bool:
        """Whether the table may be stale: a look at every container and address, no device call."""
        moved, self._moved[:] = bool(self._moved), []
        return moved or self._watch.has_moved()

    def sync_structure(self, *, leave_out: bool = False) -> Iterator[GovernorEvent]:
        """As the base class; the device is done with the old table before it is changed."""
        if torch.cuda.is_current_stream_capturing():
            raise self._not_recordable("its structure changed since the last eager step")
        self.wait()
        restorable = frozenset[Hashable]().union(*(host.keys for host in self._host.values()))
        before = [place.live for place in self.slots.places.values()] + [self.slots.table.data]
        self.slots.keep(restorable)
        yield from super().sync_structure(leave_out=leave_out)
        # What is let go may be used by launches on streams that its allocator knows nothing of.
        for tensor in [*before, self.slots.table.data]:
            for stream in (self._flight.stream, torch.cuda.current_stream(self.tracked.device)):
                tensor.record_stream(stream)

    def _check_recordable(self) -> None:
        if self._watch.has_moved() and not self.slots.is_current(self.tracked.tensors()):
            raise self._not_recordable("its structure changed since the last eager step")
        for i, optimizer in enumerate(self.tracked.optimizers):
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

    def capture(self) -> Iterator[GovernorEvent]:
        """Copy the state to the slot that was ordered by hand."""
        if self._structure_moved():
            yield from self.sync_structure()
        self._judged = max(self._judged, self.step_count)
        self._capture_aside()

    def restore(self) -> Iterator[GovernorEvent]:
        """Enqueue a restore whose order was given by hand."""
        self.wait()
        if self._structure_moved():
            yield from self.sync_structure(leave_out=True)
        self._launch_restore()
        self.tell_left_out()

    def restore_again(self) -> Iterator[GovernorEvent]:
        """Put back once more, uncounted, what the last rollback put back: it may have changed since."""
        self.wait()
        if self._structure_moved():
            yield from self.sync_structure(leave_out=True)
        ops.snapshot_restore_(self._state_with_order(), self._column, self._settings, self.slots.table, None)
        self._reconcile(again=True)  # the host-side parts once more, too

    def order(self, order: Order, reason: PanicReason = PanicReason.MANUAL, tensor: int = -1) -> None:
        """Give an order from outside the rule."""
        self.wait()
        super().order(order, reason, tensor)

    def adopt_current_state(self) -> None:
        """Capture the state as it is and make it the last known good one at once; waits for the device."""
        self.synchronize()
        for _ in self.sync_structure():
            pass
        host = HostState.of(self.tracked)
        self.order(Order.CAPTURE)
        self._capture_here()
        bad = int(self._state[StateField.candidate_bad, self._column])  # sync: attach, reset and loading only
        if bad >= 0:
            raise ValueError(
                f"model: expected a finite state, got NaN or infinity in {self.slots.names[bad]}"
            )
        self.order(Order.PROMOTE)
        self.synchronize()
        self._judged, self._known_rollbacks = self.step_count, self._reader.status(StatusField.rollback_count)
        self._host.clear()
        self._keep_host_state(host, self._judged)

    def reconcile(self) -> None:
        """Put host-side parts back if the device has rolled back since the last look. Plain loads alone."""
        count = self._reader.status(StatusField.rollback_count)
        if count != self._known_rollbacks and not torch.cuda.is_current_stream_capturing():
            self._known_rollbacks = count
            self._reconcile(again=False)

    def _reconcile(self, *, again: bool) -> None:
        step = self._reader.status(StatusField.restored_step)
        known = [s for s in self._host if s <= step]
        host = self._host[max(known)] if known else self._host[min(self._host)]
        missing = [key for key, place in self.slots.places.items() if not place.is_live and key in host.keys]
        if missing:
            # sync: state was cleared by hand, rare
            slot = int(self._state[StateField.last_good, self._column])
            for key, tensor in self.slots.missing_live(slot, host.keys):
                self.tracked.recreate(key, tensor)
        host.load_into(self.tracked, keep_fresh=True, again=again)
        self.tell_left_out()

    # -- seeds -----------------------------------------------------------------------------------------------

    def _check_seeds(self) -> Iterator[GovernorEvent]:
        """Search incubating seeds on the device now and then; cull the one whose flag has arrived."""
        for name, holder in self.seed_holders:
            flag, searched = self._seed_flags.get(name, (None, []))
            if flag is not None and float(flag.numpy()[0]) > 0:
                del self._seed_flags[name]
                self.tracked.retire(searched)
                if holder.incubating_tensors():
                    holder.cull()
                    yield SeedCulledEvent(step=self.step_count, row=self._column, name=name)
                continue
            interval = self._config.seed_check_interval
            tensors = holder.incubating_tensors() if interval and self._judged % interval == 0 else []
            if tensors:
                if flag is None:
                    flag = allocate(8, self.tracked.device).view(torch.float64).zero_()
                flag.copy_(ops.tensor_stats(tensors)[2:3], non_blocking=True)
                self._seed_flags[name] = (flag, tensors)


def _before_optimizer_step(flight: _Flight, *_: object) -> None:
    flight.wait()


class _BeforeLoading:
    """The model's hook; a copied or pickled model is not governed, so there it does nothing."""

    def __init__(self, flight: _Flight | None = None) -> None:
        self._flight = flight

    def __call__(self, *_: object) -> None:
        if self._flight is not None:
            self._flight.wait()

    def __reduce__(self) -> tuple[type[_BeforeLoading], tuple[()]]:
        return _BeforeLoading, ()


def _let_go(flight: _Flight, handles: list[RemovableHandle], memory: object) -> None:
    """The end of an engine: no launch may still touch ``memory``, which lives as long as the arguments."""
    for handle in handles:
        handle.remove()
    for stream in (flight.stream, *flight.users.values()):
        if not stream.query():
            stream.synchronize()  # sync: when a governor goes while its work is under way
