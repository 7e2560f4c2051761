"""One governed model: carries out the orders that the judge wrote into its column of the state.

The judge decides, in ``governor_step_``; an engine only obeys: capture to the ordered slot, restore from the
last known good one, and put the host-side parts back beside the tensors.
:mod:`tolaria.governor.host_engine` serves tensors in CPU memory, :mod:`tolaria.governor.device_engine` CUDA.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from tolaria import ops
from tolaria.governor import uncovered
from tolaria.governor.distributed import ANOTHER_RANKS, OTHER_RANK
from tolaria.governor.peers import Peers
from tolaria.governor.row import Row
from tolaria.ops import Order, PanicReason, StatusField
from tolaria.snapshot.base import SnapshotBase
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.finite_state import stored_values
from tolaria.snapshot.host_state import HostState
from tolaria.snapshot.optimizer_state import HostValues
from tolaria.snapshot.watch import BeforeSteps
from tolaria.telemetry.events import AttachEvent, GovernorEvent, SeedCulledEvent, StructureEvent, VerdictEvent

_FIRST_HOST_PART = 1 << 24
"""More than there are tensors in slots."""


class Engine(SnapshotBase, ABC):
    """What both kinds of engine share.

    Attributes:
        is_late: whether the host hears of a rollback only some time after it happened.

    Args:
        row: the governor that gives the orders.
        covered: what is covered.

    Raises:
        ValueError: a parameter is not finite.
        SnapshotError: there is no memory for the slots, or a tensor cannot be copied byte by byte.
    """

    is_late = False

    def __init__(self, row: Row, covered: CoveredState) -> None:
        self._row = row
        self.untold: deque[GovernorEvent] = deque()
        """Events that the ops cannot know, for whoever calls to tell once the work is done."""
        self._host_parts: list[str] = []
        self._readers: list[tuple[int, threading.Thread]] = []
        """Who reads which slot, to write it to disk."""
        self.has_restored_again = False
        """The rates are those of a capture once more: what was done to them since is to be done again."""
        self.defer_panics = False
        """Leave a poisoned capture to the next judgement, where ranks agree, instead of panicking at once."""
        super().__init__(covered, row.config.storage)
        if self.broken:
            raise ValueError(
                f"model: expected finite parameters, got NaN or infinity in {', '.join(self.broken[:5])}"
                + (f" and {len(self.broken) - 5} more" if len(self.broken) > 5 else "")
                + "; a governor cannot vouch for such a state"
            )
        self._steps = BeforeSteps(self._notice_growth)
        self.peers = Peers(row, covered)

    @property
    def step_count(self) -> int:
        """Judgements so far, as far as the host knows."""
        return self._row.reader.status(StatusField.step)

    # -- what an engine does ---------------------------------------------------------------------------------

    @abstractmethod
    def act(self) -> None:
        """Carry out what the last judgement ordered."""

    @abstractmethod
    def snapshot(self) -> None:
        """Capture now, by hand.

        Raises:
            SnapshotError: the state cannot be captured; nothing was ordered then.
        """

    @abstractmethod
    def restore(self) -> None:
        """Put the last known good state back, in place; the order must have been given."""

    @abstractmethod
    def restore_again(self) -> None:
        """Put back once more, uncounted, what the last rollback put back: it may have changed since."""

    @abstractmethod
    def _capture_and_promote(self, host: HostState) -> None:
        """Capture the state, known to be finite, and make it the last known good one at once."""

    def rollback(self, reason: PanicReason = PanicReason.MANUAL, bad: str | None = None) -> None:
        """Restore now, from outside the rule. What may fail comes before the order.

        Args:
            reason: why, unless a rollback is pending already.
            bad: name of what is not finite, if that is why.
        """
        self.follow_structure(leave_out=True)
        self.order(Order.ROLLBACK, reason, -1 if bad is None else self._number_of(bad))
        self.restore()

    def tell_bad(self, name: str | None) -> None:
        """Tell of something in the live state that is not finite, where nothing is to be done about it."""
        nan = math.nan
        event = VerdictEvent(
            step=self.step_count, row=self._row.column, reason=PanicReason.NON_FINITE_STATE, rollback=True,
            loss=nan, mean=nan, std=nan, thresholds=(nan, nan, nan), consecutive_panics=0, tensor_name=name,
        )  # fmt: skip
        self.untold.append(event)

    def first_bad(self) -> str | None:
        """Name of the first thing in the live state that is not finite; waits for the device.

        Seeds that are poisoned while they incubate go first, and alone.

        Raises:
            SnapshotError: an extra cannot say its state.
        """
        self.complete_restore()
        self.cull_poisoned_seeds()
        bad = self.state_check.first_bad()
        if bad is None and self.covered.extras:
            bad = self.bad_host_part(HostState.of(self.covered), waits=True)
        return bad

    def adopt_current_state(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Make the state as it is the last known good one at once; waits for the device.

        Args:
            prepare: called when nothing can be refused any more, before the capture is ordered.

        Raises:
            ValueError: a covered tensor holds a non-finite value.
            SnapshotError: the state cannot be captured. Whatever is raised, no order was given.
        """
        self.synchronize()
        self.complete_restore()
        if self.slots.places:  # at attach, what is exempt was found just now
            self.refuse_nonfinite()
        self.cull_poisoned_seeds()
        self.sync_structure()
        host = self.host_parts()
        bad = self.bad_host_part(host, waits=True)
        if bad is not None:
            raise ValueError(f"{bad}: expected a finite state, got NaN or infinity")
        self.slots.table.forget_magnitudes()
        prepare()
        self._capture_and_promote(host)

    @abstractmethod
    def last_good(self) -> tuple[int, HostState]:
        """The slot of the last known good capture, and its host-side parts; waits for the device."""

    # Hooks: an engine overrides those it has something to do for.

    def complete_restore(self) -> None:
        """Complete a restore that was interrupted."""
        return

    def is_recording(self) -> bool:
        """Whether a CUDA graph is being recorded, which the host must leave alone."""
        return False

    def is_behind(self) -> bool:
        """Whether the device has rolled back since the last :meth:`reconcile`."""
        return False

    def judging(self) -> None:
        """A judgement is about to be enqueued."""
        return

    def judged(self, *, surely: bool = True) -> None:
        """A judgement was enqueued; not ``surely`` where only the device knows whether this row took part."""
        return

    def finished(self) -> None:
        """The step that :meth:`act` belongs to has come to its end, without an exception."""
        return

    def learn(self, events: Sequence[GovernorEvent]) -> None:
        """Hear of events that have arrived, before :meth:`reconcile`."""
        return

    @property
    def enqueued_step(self) -> int:
        """Judgements that were enqueued so far."""
        return self.step_count

    def correct_host_values(self, optimizer: Optimizer, right: HostValues) -> None:
        """The captures after a step that turned out to be skipped keep these host-side values instead."""
        return

    def reconcile(self) -> None:
        """Put host-side parts back for a rollback that the device has carried out meanwhile."""
        return

    def wait(self) -> None:
        """Make the current stream wait for a capture in flight."""
        return

    def synchronize(self) -> None:
        """Wait for everything that was enqueued."""
        return

    def begin_step(self) -> None:
        """Head of a step that is being recorded in a CUDA graph."""
        return

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        self._steps.hook(optimizer)

    def close(self) -> None:
        """Let go of hooks."""
        self._steps.close()
        self.peers.close()

    # -- shared ----------------------------------------------------------------------------------------------

    def name_of(self, number: int) -> str | None:
        """What has the number that a capture reports when it finds a non-finite value; None: nothing here."""
        if number >= OTHER_RANK:
            return None
        names = self.slots.names if number < _FIRST_HOST_PART else tuple(self._host_parts)
        return names[at] if (at := number % _FIRST_HOST_PART) < len(names) else None

    def _number_of(self, name: str) -> int:
        if name == ANOTHER_RANKS:
            return OTHER_RANK
        names = self.slots.names
        return names.index(name) if name in names else self.number_of_host_part(name)

    def number_of_host_part(self, name: str) -> int:
        """The number for an extra, or anything else whose tensors are in no slot."""
        if name not in self._host_parts:
            self._host_parts.append(name)
        return _FIRST_HOST_PART + self._host_parts.index(name)

    def begin_reading(self, slot: int, reader: threading.Thread) -> None:
        """``slot`` is not overwritten while ``reader``, which is about to start, runs."""
        self._readers.append((slot, reader))

    def wait_for_reader(self, slot: int | None = None) -> None:
        """Wait until ``slot``, or any if None, may be overwritten."""
        for read, reader in self._readers:
            if slot in (None, read) and reader.is_alive():
                reader.join()
        self._readers = [(read, reader) for read, reader in self._readers if reader.is_alive()]

    def sync_structure(self, *, leave_out: bool = False) -> None:
        """As the base class; places that are let go may be given to others."""
        self.wait_for_reader()
        super().sync_structure(leave_out=leave_out)

    def attach_event(self) -> AttachEvent:
        """What was attached, for telemetry."""
        return AttachEvent(
            step=self.step_count,
            row=self._row.column,
            tensors=len(self.slots.places),
            state_bytes=self.slots.table.nbytes,
            slot_bytes=self.slots.nbytes,
            exempt=tuple(
                place.name for place in self.slots.places.values() if place.key in self.slots.exempt
            ),
            generators=self.covered.generators.names(),
        )

    def order(self, order: Order, reason: PanicReason = PanicReason.MANUAL, tensor: int = -1) -> None:
        """Give an order from outside the rule."""
        self._row.order(order, reason, tensor)

    def gradient_stats(self, optimizers: Sequence[Optimizer] | None = None) -> Tensor | None:
        """``tensor_stats`` over the gradients of what the optimizers train; None if there are none.

        An incubating seed's are left out, since they cannot hurt the host. Of a complex gradient both parts
        count, so that its norm is that of |g|; of a sparse one the sums for each place.

        Args:
            optimizers: these; None: all that are covered.
        """
        aside = {id(t) for _, holder in self.seed_holders for t in holder.incubating_tensors()}
        trained = {
            id(p): p.grad
            for optimizer in (self.covered.optimizers if optimizers is None else optimizers)
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) not in aside
        }
        gradients = [_values(gradient) for gradient in trained.values()]
        return ops.tensor_stats(gradients) if gradients else None

    def cull_poisoned_seeds(self) -> None:
        """Cull, alone, every incubating seed that holds a non-finite value; the host cannot have felt it."""
        for name, holder in self.seed_holders:
            tensors = holder.incubating_tensors()
            if tensors and float(ops.tensor_stats(tensors)[2]) > 0:
                self.covered.retire(tensors)
                holder.cull()
                self.look_again()
                self.untold.append(SeedCulledEvent(step=self.step_count, row=self._row.column, name=name))

    def seeds_are_due(self) -> bool:
        """Whether incubating seeds are to be searched at this step."""
        interval = self._row.config.seed_check_interval
        return bool(interval) and self.step_count % interval == 0

    def _notice_growth(self) -> None:
        """Before an optimizer steps: new parameters get their places while they hold their birth values."""
        if not self.is_recording() and self.covered.structure() != self.structure:
            self.sync_structure(leave_out=True)

    def _structure_changed(self, known: int) -> None:
        uncovered.look_again()
        super()._structure_changed(known)
        if known and len(self.slots.places) != known:
            self.untold.append(
                StructureEvent(
                    step=self.step_count,
                    row=self._row.column,
                    tensors=len(self.slots.places),
                    state_bytes=self.slots.table.nbytes,
                )
            )


def _values(gradient: Tensor) -> Tensor:
    if gradient.layout is torch.sparse_coo:
        gradient = gradient.coalesce()  # sync: on CUDA; optimizers of sparse gradients do so, too
    return stored_values(gradient)
