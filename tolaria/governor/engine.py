"""One governed model: carries out the orders that the judge wrote into its column of the state.

The judge decides, in ``governor_step_``; an engine only obeys: capture to the ordered slot, restore from the
last known good one, and put the host-side parts back beside the tensors. This one serves tensors in CPU
memory, where the host sees the orders at once; :mod:`tolaria.governor.device_engine` serves CUDA.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.optim import Optimizer

from tolaria import ops
from tolaria.errors import UncoveredWarning
from tolaria.governor import uncovered
from tolaria.governor.config import GovernorConfig
from tolaria.ops import Order, PanicReason, StateField, StatusField
from tolaria.snapshot.coverage import Coverage, check_unsharded
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.finite_state import StateCheck
from tolaria.snapshot.host_state import HostState, HostValues
from tolaria.snapshot.place import is_finite
from tolaria.snapshot.slots import Slots, check_coverable
from tolaria.snapshot.watch import StructureWatch
from tolaria.telemetry.events import AttachEvent, GovernorEvent, SeedCulledEvent, StructureEvent
from tolaria.telemetry.mailbox import MailboxReader


class Engine(ABC):
    """What both kinds of engine share.

    Attributes:
        is_late: whether the host hears of a rollback only some time after it happened.

    Args:
        column: which governor of ``state`` gives the orders.
        state: float64 ``(fields, n)``.
        config: the settings.
        settings: the same as a tensor.
        mailbox: where the ops write events.
        reader: reads that mailbox's row.
        covered: what is covered.

    Raises:
        ValueError: a parameter is not finite.
        SnapshotError: there is no memory for the slots, or a tensor cannot be copied byte by byte.
    """

    is_late = False

    def __init__(
        self,
        column: int,
        state: Tensor,
        config: GovernorConfig,
        settings: Tensor,
        mailbox: Tensor,
        reader: MailboxReader,
        covered: CoveredState,
    ) -> None:
        self._column = column
        self._state = state
        self._config = config
        self._settings = settings
        self._mailbox = mailbox
        self._reader = reader
        self.covered = covered
        self.untold: deque[GovernorEvent] = deque()
        """Events that the ops cannot know, for whoever calls to tell once the work is done."""
        self.slots = Slots(covered.device, config.storage)
        self.defer_panics = False
        """Leave a poisoned capture to the next judgement, where ranks agree, instead of panicking at once."""
        self.structure = covered.structure()
        self.seed_holders = covered.walk().seed_holders
        self._watch = StructureWatch(covered)
        self.state_check = StateCheck(covered, self.slots, self._watch)
        check_unsharded(covered)
        self._find_exempt()
        self._coverage = Coverage(covered)
        self._coverage.look(attaching=True)

    @property
    def step_count(self) -> int:
        """Judgements so far, as far as the host knows."""
        return self._reader.status(StatusField.step)

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

    def rollback(self) -> None:
        """Restore now, by hand. What may fail comes before the order."""
        self.sync_structure(leave_out=True)
        self.order(Order.ROLLBACK)
        self.restore()

    def adopt_current_state(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Make the state as it is the last known good one at once; waits for the device.

        Args:
            prepare: called when nothing can be refused any more, before the capture is ordered.

        Raises:
            ValueError: a covered tensor holds a non-finite value.
            SnapshotError: the state cannot be captured. Whatever is raised, no order was given.
        """
        self.synchronize()
        if self.slots.places:  # at attach, what is exempt was found just now
            self.refuse_nonfinite()
        self.cull_poisoned_seeds()
        self.sync_structure()
        host = self.host_parts()
        prepare()
        self._capture_and_promote(host)

    def host_parts(self) -> HostState:
        """The host-side parts of a capture about to be made.

        Raises:
            SnapshotError: a tensor is not covered, or a part cannot say its state.
        """
        self.slots.check_whole()
        return HostState.of(self.covered)

    def refuse_nonfinite(self) -> None:
        """Look at the live tensors that a capture would search; waits for the device.

        Raises:
            ValueError: one holds a non-finite value.
        """
        known = {place.key for place in self.slots.places.values()}
        searched = [
            t
            for t in self.covered.tensors()
            if t.watched and not t.zeroed and t.key not in self.slots.exempt
            if t.key in known or t.kind != "buffer" or not known  # a mask that joins later is exempt
        ]
        bad = next((t.name for t in searched if not is_finite(t.tensor)), None)
        if bad is not None:
            raise ValueError(f"model: expected a finite state, got NaN or infinity in {bad}")

    # Hooks: an engine overrides those it has something to do for.

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

    def renew(self, config: GovernorConfig) -> None:
        """Go on under other settings, whose tensor has changed in place."""
        self._config = config

    def hook(self, optimizer: Optimizer) -> None:
        """Watch one more optimizer."""
        return

    def close(self) -> None:
        """Let go of hooks."""
        return

    # -- shared ----------------------------------------------------------------------------------------------

    def _find_exempt(self) -> None:
        """Tensors that are non-finite from the start are copied but not searched; a parameter may not be."""
        covered = self.covered.tensors()
        check_coverable(covered)
        bad = [t for t in covered if not is_finite(t.tensor)]
        broken = [t.name for t in bad if t.kind == "parameter"]
        if broken:
            raise ValueError(
                f"model: expected finite parameters, got NaN or infinity in {', '.join(broken[:5])}"
                + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
                + "; a governor cannot vouch for such a state"
            )
        self.slots.exempt = frozenset(t.key for t in bad)

    def attach_event(self) -> AttachEvent:
        """What was attached, for telemetry."""
        return AttachEvent(
            step=self.step_count,
            row=self._column,
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
        ops.governor_order_(self._state, self._settings, self._column, order, reason, tensor, self._mailbox)

    def gradient_stats(self) -> Tensor | None:
        """``tensor_stats`` over the gradients of what the optimizers train; None if there are none.

        An incubating seed's are left out, since they cannot hurt the host. Of a sparse gradient the stored
        values count.
        """
        aside = {id(t) for _, holder in self.seed_holders for t in holder.incubating_tensors()}
        gradients = [
            p.grad._values() if p.grad.is_sparse else p.grad
            for optimizer in self.covered.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None and id(p) not in aside
        ]
        return ops.tensor_stats(gradients) if gradients else None

    def _state_with_order(self) -> Tensor:
        """A copy of the judge's state that orders a restore, whose bookkeeping is then thrown away."""
        state = self._state.clone()
        state[StateField.restore_order, self._column] = 1.0
        return state

    def cull_poisoned_seeds(self) -> None:
        """Cull, alone, every incubating seed that holds a non-finite value; the host cannot have felt it."""
        for name, holder in self.seed_holders:
            tensors = holder.incubating_tensors()
            if tensors and float(ops.tensor_stats(tensors)[2]) > 0:
                self.covered.retire(tensors)
                holder.cull()
                self.structure = []
                self.untold.append(SeedCulledEvent(step=self.step_count, row=self._column, name=name))

    def seeds_are_due(self) -> bool:
        """Whether incubating seeds are to be searched at this step."""
        interval = self._config.seed_check_interval
        return bool(interval) and self.step_count % interval == 0

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering ``optimizer``; the captures forget it too."""
        if any(known is optimizer for known in self.covered.optimizers):
            self.covered.optimizers = [o for o in self.covered.optimizers if o is not optimizer]
            self.slots.forget_optimizer(optimizer)

    def sync_structure(self, *, leave_out: bool = False) -> None:
        """Look for tensors that came, went or moved, and lay the slots out anew if there are any.

        Args:
            leave_out: go without tensors that cannot be covered; see :meth:`Slots.sync`.

        Raises:
            SnapshotError: a tensor cannot be covered. The slots and their table stay as they were, and the
                next act looks again.
        """
        known = len(self.slots.places)
        walk = self.covered.walk()
        tensors = self.covered.tensors(walk)
        self._watch.forget()  # whatever happens from here on, the next look finds a change
        changed = self.slots.sync(tensors, leave_out=leave_out)
        self.structure = self.covered.structure()
        self.seed_holders = walk.seed_holders
        if not self.slots.left_out:
            self._watch.mark(walk, tensors)
        if changed:
            uncovered.look_again()
        if changed and known:
            self._coverage.look()
        if changed and known and len(self.slots.places) != known:
            self.untold.append(
                StructureEvent(
                    step=self.step_count,
                    row=self._column,
                    tensors=len(self.slots.places),
                    state_bytes=self.slots.table.nbytes,
                )
            )

    def tell_left_out(self) -> None:
        """Warn of live tensors that a restore has left alone, unless an error has named them before."""
        if self.slots.left_out and (new := self.slots.untold(self.covered.tensors())):
            warnings.warn(
                "governor: a rollback leaves alone what no capture can hold: "
                + "; ".join(f"{name}: {why}" for name, why in new.items()),
                UncoveredWarning,
                stacklevel=2,
            )


class HostEngine(Engine):
    """Snapshots and rollbacks of a model in CPU memory; arguments as for :class:`Engine`."""

    def __init__(
        self,
        column: int,
        state: Tensor,
        config: GovernorConfig,
        settings: Tensor,
        mailbox: Tensor,
        reader: MailboxReader,
        covered: CoveredState,
    ) -> None:
        super().__init__(column, state, config, settings, mailbox, reader, covered)
        self._view: npt.NDArray[np.float64] = state.numpy()[:, column]
        self._host: list[HostState | None] = [None, None]
        self.adopt_current_state()

    def act(self) -> None:
        """Carry out what the last judgement ordered."""
        if self._view[StateField.restore_order]:
            self.restore()
        elif self._view[StateField.capture_order_0] >= 0:
            self.cull_poisoned_seeds()
            self.sync_structure()
            self._capture(self.host_parts())
        elif self.covered.structure() != self.structure:
            self.sync_structure()
        if self.seed_holders and self.seeds_are_due():
            self.cull_poisoned_seeds()

    def sync_structure(self, *, leave_out: bool = False) -> None:
        """As the base class, where something may have changed."""
        if not self.structure or self._watch.has_moved():
            super().sync_structure(leave_out=leave_out)

    def snapshot(self) -> None:
        """Capture now, by hand."""
        self.cull_poisoned_seeds()
        self.sync_structure()
        host = self.host_parts()
        self.order(Order.CAPTURE)
        self._capture(host)

    def _capture(self, host: HostState) -> None:
        """Copy the state to the ordered slot. A non-finite value on the way is a panic and rolls back."""
        self._copy_to_slot(host)
        bad = int(self._view[StateField.candidate_bad])
        if bad >= 0 and not self.defer_panics and not self._config.log_only:
            self.order(Order.ROLLBACK, PanicReason.NON_FINITE_STATE, bad)
            self.restore()

    def _copy_to_slot(self, host: HostState) -> None:
        slot = int(self._view[StateField.capture_order_0])
        self._host[slot] = None  # from here to the end the slot is neither the old capture nor the new one
        for part in (0, 1):
            ops.snapshot_capture_(self._state, self._column, self.slots.table, part, self._mailbox)
        host.keys = self.slots.mark_captured(slot)
        self._host[slot] = host

    def restore(self) -> None:
        """Put the last known good state back, in place; the order must have been given."""
        self._put_back(self._state, self._mailbox)

    def restore_again(self) -> None:
        """Put back once more, uncounted, what the last rollback put back: it may have changed since."""
        self._put_back(self._state_with_order(), None, again=True)

    def _put_back(self, state: Tensor, mailbox: Tensor | None, *, again: bool = False) -> None:
        self.sync_structure(leave_out=True)
        slot = int(self._view[StateField.last_good])
        host = self._host[slot]
        assert host is not None, "the last known good slot always has its host-side parts"
        for key, tensor in self.slots.missing_live(slot, host.keys):
            self.covered.recreate(key, tensor)
        kept = host.rates_to_keep(self.covered)
        ops.snapshot_restore_(state, self._column, self._settings, self.slots.table, mailbox)
        host.load_into(self.covered, again=again, kept=kept)
        self.tell_left_out()

    def _capture_and_promote(self, host: HostState) -> None:
        self.order(Order.CAPTURE)
        self._copy_to_slot(host)
        self.order(Order.PROMOTE)
