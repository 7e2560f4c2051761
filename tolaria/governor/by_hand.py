"""What a user asks of a governor by hand, between steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from tolaria.governor import uncovered
from tolaria.governor.one_thread import one_thread
from tolaria.governor.readings import Readings
from tolaria.governor.validation import as_metric
from tolaria.governor.verifying import roll_back, verify
from tolaria.ops import PanicReason
from tolaria.snapshot.inference import outside_inference
from tolaria.snapshot.inner_optimizers import seen_through
from tolaria.snapshot.parts import check_schedulers
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import GovernorEvent, ValidationEvent
from tolaria.telemetry.sinks import Sink, check_sinks
from tolaria.telemetry.verdict import GovernorReport, Verdict, Verification

T = TypeVar("T", bound="CallsByHand")


class CallsByHand(Readings):
    """The calls of a :class:`TolariaGovernor` that are no part of a step."""

    _telemetry: Telemetry

    def _begin(self) -> None:
        self._latest: Verdict | None = None
        self._is_judged_ahead = False  # a verdict is out: the step that it is about is under way
        self._telemetry.labels.forget()

    def _follow(self) -> None:
        """The end of a step: the host does its share of what the device has done."""
        self._attached.follower.end_step()

    def _tell(self) -> None:
        """Tell the sinks, once everything is done; then end a run that makes no progress."""
        self._attached.choose_way()
        self._telemetry.deliver()
        self._attached.policy.check_budget()

    @one_thread
    def execute_rollback(self) -> GovernorReport:
        """Restore the last known good state now.

        The reason is the pending one, or MANUAL. After a rollback since the last judgement its state is put
        back once more, its report returned again, and nothing counted twice. On CUDA it waits for the device.

        Raises:
            TrainingDivergedError: rollbacks come too often.
        """
        at, engine = self._attached, self._engine
        at.refuse_recording("execute_rollback")
        at.catch_up()  # sync: the report is wanted now
        last = self.last_report
        now = self.step_count, self.rollback_count
        if last is not None and (last.step, last.rollback_count) == now:
            try:
                engine.restore_again()
                engine.has_restored_again = True  # what is done to the rates then is done to them again
            finally:
                self._follow()
            self._restored()
        else:
            with self._rolling_back():
                roll_back(engine, at.follower, PanicReason.MANUAL)
        self._tell()
        assert self.last_report is not None
        return self.last_report

    @contextmanager
    def _rolling_back(self) -> Iterator[None]:
        """A rollback may happen within; it may have happened even if something is raised, by an extra."""
        before = self.rollback_count
        try:
            yield
        finally:
            if self.rollback_count != before:
                self._restored()

    def _restored(self) -> None:
        """What was gathered of a step under way belongs to the state that is gone."""
        self._attached.mark_step()
        self._attached.expect_loss()

    @one_thread
    def verify(self) -> Verification:
        """Look at the live state now, and roll back if it is not finite.

        It answers the question "may I save this?"::

            if governor.verify():
                torch.save(model.state_dict(), path)

        It looks at all that a capture would search: parameters, buffers, optimizer state, extras. Finite is
        all that they must be; whether the run is well says :attr:`is_quiet`. What was not finite at attach
        (masks) is exempt; a poisoned seed that incubates is culled, alone. A rollback that was called for and
        not carried out yet is carried out. Where all is fine, the candidate on probation is left alone. With
        ``log_only`` it tells and does not act. Where ranks judge together, all must call it. It costs one
        pass over the state; on CUDA it waits for the device.

        Returns:
            True if the state was fine. Else it is the last known good one again; :attr:`Verification.report`
            says which, and :attr:`Verification.tensor_name` what was not finite.

        Raises:
            TolariaError: a CUDA graph is being recorded, or the governor is closed.
            SnapshotError: an extra cannot say its state, or refuses the captured one.
            TrainingDivergedError: rollbacks come too often.
        """
        at = self._attached
        at.refuse_recording("verify")
        at.catch_up()  # sync: the answer is wanted now
        found = self._verify()
        self._tell()
        return found

    def _verify(self) -> Verification:
        at = self._attached
        with self._rolling_back():
            return verify(at.row, at.engine, at.follower, at.judge.is_on_any_rank)

    @one_thread
    def step_validation(self, metric: Tensor | float, *, higher_is_better: bool) -> GovernorReport | None:
        """Judge what you validate, beside the training loss, which may never show a collapse of it.

        Call it after each validation, with one metric. It is bad if it is not finite, or if it lies six
        deviations on the worse side of the median of the last ten healthy ones, once there are three; a
        deviation is at least 5% of the median. From a bad one to the next good one no capture falls due and
        none is promoted; ``config.validation_patience`` (2) bad ones in a row are a rollback with the reason
        VALIDATION. A rollback, for whatever reason, takes the values of the states that it undoes away. On
        CUDA it waits for the device. Where ranks judge together, all must call it, each with its own value or
        with one for all; a bad one on any of them counts for all.

        Args:
            metric: one value: a number, or a tensor of any floating dtype.
            higher_is_better: True for an accuracy, False for a loss; the same at every call.

        Returns:
            The report, if it was rolled back.

        Raises:
            TypeError, ValueError: an argument is something else; nothing is judged then.
            TolariaError: a CUDA graph is being recorded, or the governor is closed.
            TrainingDivergedError: rollbacks come too often.
        """
        at, engine = self._attached, self._engine
        at.refuse_recording("step_validation")
        value = as_metric(metric)
        if not isinstance(higher_is_better, bool):
            raise TypeError(
                f"higher_is_better: expected True or False, got {type(higher_is_better).__name__}"
            )
        at.catch_up()  # sync: the answer is wanted now
        window = at.policy.validation
        bound = window.bound()
        is_last_straw = window.judge(value, self.step_count, higher_is_better=higher_is_better)
        calls = at.judge.is_on_any_rank(is_last_straw)
        if window.bad_in_a_row:
            told = ValidationEvent(
                step=self.step_count,
                metric=value,
                bound=bound,
                bad_in_a_row=window.bad_in_a_row,
                rollback=calls,
            )
            self._telemetry.add([told])
        if calls:
            window.forgive()
        at.row.hold(is_held=not calls and at.judge.is_on_any_rank(window.bad_in_a_row > 0))
        acts = calls and not at.row.config.log_only
        if acts:
            with self._rolling_back():
                roll_back(engine, at.follower, PanicReason.VALIDATION)
        self._tell()
        return self.last_report if acts else None

    @one_thread
    def snapshot(self) -> None:
        """Capture now, on probation; it replaces a candidate, never the last known good state.

        It may be called as often as you like. While a capture that was made by hand is on probation, from the
        next judgement on, another one waits until that is decided, at the end of that step. So one is
        promoted every ``probation`` healthy steps, even if each of them asks for another. On CUDA the host
        hears late of it, and another one waits no longer than ``snapshot_interval`` steps; where ranks judge
        together there, just so many.

        Raises:
            SnapshotError: the state cannot be captured; the candidate is what it was then.
        """
        at, engine = self._attached, self._engine
        at.refuse_recording("snapshot")
        try:
            at.captures.ask()
        finally:
            at.follower.hear()
            at.follower.follow_between_steps() if engine.is_late else at.follower.follow()
        self._tell()

    @one_thread
    def reset(self) -> None:
        """Forget all losses and make the current state the last known good one, as at attach.

        Raises:
            ValueError: the current state is not finite; then nothing is forgotten.
            SnapshotError: the current state cannot be captured; likewise.
        """
        at = self._attached
        at.refuse_recording("reset")
        at.catch_up()  # sync: looks at the state as it is
        at.reset()
        at.expect_loss()
        self._follow()
        self._tell()

    def wait(self) -> None:
        """Make the current stream, not the host, wait for a capture in flight (nothing to do on the CPU).

        Call it before changing captured tensors in place outside an optimizer step, and before replaying a
        CUDA graph right after an eager step.
        """
        self._engine.wait()

    @one_thread
    def close(self) -> None:
        """Let go of the model, the hooks and the slots; calls but ``poll`` are errors. Again: nothing.

        First the state is verified, as :meth:`verify` does: of the last step no loss is judged any more, and
        what it did to the weights must not outlive the training. A rollback that the host has not heard of is
        heard of, and followed; saves are waited for. Where ranks judge together, all must call it; one that
        closes while an exception is on its way, or when the process group is gone, verifies nothing.

        ``with governor:`` closes it, too, at the end.

        Raises:
            TolariaError: a CUDA graph is being recorded; it is not closed then.
            SnapshotError: an extra cannot say its state, or refuses the captured one; it is closed then.
        """
        at = self._attached
        if at.running is None:
            return
        at.refuse_recording("close")
        with ExitStack() as last:  # backwards, whatever is raised on the way
            last.callback(self._telemetry.deliver)
            last.callback(at.close)
            last.callback(uncovered.unwatch, at.running.covered)
            last.callback(at.saver.finish, at.start_saving)
            at.catch_up()  # sync: nothing is heard of later
            if at.judge.may_ask_ranks:
                self._verify()

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "governor: it watches one model and cannot be copied or pickled; make a new one for the copy and "
            "hand it state_dict()"
        )

    # -- telemetry -------------------------------------------------------------------------------------------

    @outside_inference
    def poll(self) -> list[GovernorEvent]:
        """Events that arrived since the last call, oldest first; never waits, and may be called anywhere.

        It only tells. Host-side parts and the policy of a rollback that arrives late are for the end of the
        next :meth:`step`; between two steps, in the thread that trains, they are put in place here already. A
        run that ends since rollbacks come too often is ended by the next :meth:`step`, not here.
        """
        follower = self._attached.follower
        follower.hear()
        if not self._is_judged_ahead:
            follower.follow_between_steps()
        self._telemetry.deliver()
        return self._telemetry.take()

    def synchronize(self) -> list[GovernorEvent]:
        """Wait until everything ordered so far is done, then :meth:`poll`."""
        self._attached.refuse_recording("synchronize")
        self._engine.synchronize()
        return self.poll()

    def add_sink(self, sink: Sink) -> None:
        """Call ``sink`` with every event from now on."""
        check_sinks([sink])
        self._telemetry.sinks.append(sink)

    # -- structure and saving --------------------------------------------------------------------------------

    @one_thread
    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Cover another optimizer, for instance that of a seed just germinated.

        Raises:
            TypeError: it is no optimizer.
            SnapshotError: its state cannot be covered; it is not added then.
        """
        if self._attached.add_optimizer(optimizer):
            self._attached.follower.hear()
            self._telemetry.deliver()

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering an optimizer (one that is not covered is ignored), and say nothing of its steps."""
        uncovered.dismiss(seen_through(optimizer))
        self._engine.remove_optimizer(optimizer)

    def add_scheduler(self, scheduler: Stateful) -> None:
        """Cover another learning-rate scheduler."""
        check_schedulers([scheduler])
        self._engine.covered.schedulers.append(scheduler)

    @one_thread
    def notify_structure_changed(self) -> None:
        """Look at the model's structure now. Optional: the next step, capture or rollback notices growth."""
        self._engine.sync_structure()
        self._attached.follower.hear()
        self._telemetry.deliver()

    @one_thread
    def load_state_dict(self, state: Mapping[str, Any], *, keep_config: bool = True) -> None:
        """Go on from a saved run: statistics, counts, when captures are due.

        The current model state becomes the last known good one at once.

        Args:
            state: from :meth:`state_dict`, through JSON, too.
            keep_config: keep the settings in force, and the random-guess loss if this governor was given one;
                of a longer window the newest losses stay. False: the saved ones come into force.

        Raises:
            ValueError, TypeError: ``state`` is not from :meth:`state_dict`, or the model is not finite.
            SnapshotError: there is no memory for the new slots. Whatever is raised, nothing has changed.
        """
        self._attached.refuse_recording("load_state_dict")
        former = self._attached
        self._attached = former.taking_over(state, keep_config=keep_config)
        if self._attached is not former:
            former.make_way()
        self._begin()
        self._telemetry.add([self._attached.resume_event(config_kept=keep_config)])
        self._telemetry.deliver()
