"""What the host does about what a governor did: it hears of it, and it follows.

*Hearing* is reading the mailbox by plain loads. Any thread may do so at any time, except while a CUDA graph
is being recorded, when nothing is heard: what follows would become part of the graph.

*Following* is the host's share of a rollback: host-side parts put back, gradients cleared, learning rates
lowered. It changes what a training step under way is working with, so it belongs to the end of a step, in the
thread that trains.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator

from torch import Tensor
from torch.optim import Optimizer

from tolaria.governor.engine import Engine
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.saving import Saver
from tolaria.governor.skipping import StepSkipper
from tolaria.ops import StatusField
from tolaria.snapshot.covered import CoveredState
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import (
    CaptureEvent,
    GovernorEvent,
    PromotionEvent,
    RollbackEvent,
    VerdictEvent,
)
from tolaria.telemetry.mailbox import MailboxReader
from tolaria.telemetry.verdict import GovernorReport

_FOLLOWED = (CaptureEvent, PromotionEvent, RollbackEvent, VerdictEvent)


class StepMark:
    """Remembers the end of a step, and tells whether the next has begun: whether gradients have changed."""

    def __init__(self) -> None:
        self._thread: int | None = None
        self._parameter: weakref.ref[Tensor] | None = None
        self._gradient: weakref.ref[Tensor] | None = None
        self._version = 0

    def set(self, covered: CoveredState) -> None:
        """A step ends here; looks at the first gradient there is."""
        self._thread = threading.get_ident()
        self._parameter = self._gradient = None
        for parameter in _parameters(covered.optimizers):
            if parameter.grad is not None:
                self._parameter, self._gradient = weakref.ref(parameter), weakref.ref(parameter.grad)
                self._version = parameter.grad._version
                return

    def is_under_way(self, covered: CoveredState) -> bool:
        """Whether a step may have begun since; always, for another thread than the one that trains."""
        if self._thread is not None and self._thread != threading.get_ident():
            return True
        stages = getattr(covered.scaler, "_per_optimizer_states", {}).values()
        if any(getattr(state.get("stage"), "name", "READY") != "READY" for state in stages):
            return True
        if self._gradient is None or self._parameter is None:
            return any(parameter.grad is not None for parameter in _parameters(covered.optimizers))
        parameter, gradient = self._parameter(), self._gradient()
        if parameter is None or gradient is None:
            return True
        return parameter.grad is not gradient or gradient._version != self._version


def _parameters(optimizers: list[Optimizer]) -> Iterator[Tensor]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _nobody(number: int) -> None:
    """The name of a tensor once the governor is closed."""


class Follower:
    """Hears and follows for one governor, or one row of a bank.

    Args:
        reader: reads its mailbox.
        engine: its engine; None for a row without a model, for which there is nothing to follow.
        policy: what a rollback does beside the restore.
        telemetry: where events go.
    """

    def __init__(
        self, reader: MailboxReader, engine: Engine | None, policy: RollbackPolicy, telemetry: Telemetry
    ) -> None:
        self._reader = reader
        self.engine = engine
        self.policy = policy
        self._telemetry = telemetry
        self.skipper: StepSkipper | None = None
        self.saver: Saver | None = None
        self.mark = StepMark()
        self.last_report: GovernorReport | None = None
        self._heard: deque[GovernorEvent] = deque()
        """What is still to be followed; it stays until it is, since following may be interrupted."""
        self._learnt = 0
        """How many of them all but the policy know of."""
        self._lock = threading.RLock()  # of what the reader has read, what was heard, and their order
        self._following = threading.RLock()
        """Whoever follows: two threads would both do what was heard."""

    def hear(self) -> None:
        """Queue the events that have arrived: what the engine knows, then what the device wrote."""
        engine = self.engine
        if engine is not None and engine.is_recording():
            return
        if not self._reader.has_news and (engine is None or not engine.untold):
            return
        with self._lock:
            events: list[GovernorEvent] = []
            while engine is not None and engine.untold:
                events.append(engine.untold.popleft())
            known = (engine.name_of, engine.slots.table.nbytes) if engine is not None else (_nobody, 0)
            for event in map(self._telemetry.labels.on, self._reader.read(*known)):
                events.append(event)
                if isinstance(event, RollbackEvent):
                    self.last_report = event.report
                if engine is not None and isinstance(event, _FOLLOWED):
                    self._heard.append(event)
            self._telemetry.add(events)

    def follow(self, *, waits: bool = True) -> None:
        """Do the host's share of what was heard, and of a rollback that the status words alone tell of.

        Args:
            waits: wait for another thread that is at it; else leave it to that one.

        Raises:
            SnapshotError: an extra refused its state; everything else is done.
        """
        engine = self.engine
        if engine is None or engine.is_recording() or not self._following.acquire(blocking=waits):
            return
        try:
            self._follow(engine)
        finally:
            self._following.release()

    def _follow(self, engine: Engine) -> None:
        if engine.has_restored_again:
            self.policy.apply(engine.covered)
            engine.has_restored_again = False
        with self._lock:
            events = list(self._heard)
        if not events and not engine.is_behind():
            return
        try:
            new = events[self._learnt :]
            engine.learn(new)
            self._learnt = len(events)
            if self.skipper is not None:
                self.skipper.learn(new)
            if self.saver is not None:
                self.saver.learn(new)
            engine.reconcile()
        finally:
            for event in events:
                if not self._heard or self._heard[0] is not event:
                    break  # a call from within, by an extra that takes its state back, did the rest
                self.policy.hear(event, engine.covered)
                self._learnt = max(0, self._learnt - 1)
                self._heard.popleft()

    def end_step(self) -> None:
        """The end of a step: the host does its share of what the device has done.

        Ctrl-C is handed on when it is done; a second one leaves the rest to the next call.
        """
        try:
            self._end_step()
        except Exception:
            raise
        except BaseException:
            self._end_step()
            raise

    def _end_step(self) -> None:
        self._hear_and_follow()
        if self.engine is not None:
            self.mark.set(self.engine.covered)

    def _hear_and_follow(self, *, waits: bool = True) -> None:
        step, engine = self._reader.status(StatusField.step), self.engine
        self.hear()
        self.follow(waits=waits)
        if engine is not None and not engine.is_recording():
            # A device counts a step before it counts its news: of the one before everything has been heard.
            self.policy.end_step(engine.covered, step - engine.is_late)

    def follow_between_steps(self) -> None:
        """Follow late news, unless a step is under way: gradients and rates are left alone until it ends."""
        engine = self.engine
        if engine is not None and engine.is_late and not self.mark.is_under_way(engine.covered):
            self._hear_and_follow(waits=False)
