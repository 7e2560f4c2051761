"""The watchdog of one training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria._arguments import check_optional
from tolaria.governor import uncovered
from tolaria.governor.attachment import Attachment
from tolaria.governor.config import GovernorConfig, resolve_random_guess_loss
from tolaria.governor.distributed import check_ranks
from tolaria.governor.engine import Engine
from tolaria.governor.judging import check_verdict
from tolaria.governor.one_thread import one_thread
from tolaria.governor.readings import Readings
from tolaria.ops import StateField
from tolaria.ops.governor import judge_
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.inference import outside_inference
from tolaria.snapshot.parts import Cover, Parts, ScheduleChoice, check_schedulers
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import GovernorEvent
from tolaria.telemetry.sinks import Sink, check_sinks
from tolaria.telemetry.verdict import GovernorReport, Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERDICT_FIELDS = StateField.reward + 1


class TolariaGovernor(Readings):
    """Watches the loss of a training run and rolls model and optimizers back when it blows up.

    Call :meth:`step` once per optimizer step, after ``optimizer.step()`` (and ``scaler.update()``) and before
    the next forward::

        governor = TolariaGovernor(model, optimizer, num_classes=10)
        for x, y in loader:
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            governor.step(loss)

    Attaching captures the current state as the last known good one, in two slots (AdamW: 6x the parameters).

    Args:
        model: parameters and buffers to cover; all on one device.
        optimizers: one optimizer or several; all their state and hyper-parameters are covered.
        config: settings; None means :class:`GovernorConfig` with its defaults.
        num_classes: for a classifier; the random-guess loss is then ``ln(num_classes)``.
        random_guess_loss: loss of guessing; overrides ``num_classes``. Without either: no lobotomy rule.
        schedulers: learning-rate schedulers to roll back. Those of torch are found, too; another kind is
            named in an ``UncoveredWarning``.
        scaler: the ``torch.amp.GradScaler`` in use.
        extras: named objects to roll back too (EMA, sampler): anything with ``state_dict`` and
            ``load_state_dict``.
        generators: random generators beside the default ones, for ``config.restore_rng``.
        schedules: ``"rewind"``: a rollback takes schedulers, and the rates they drive, back (and replays bit
            for bit); ``"keep"``: they stay where they are, for trainers that count the steps of a whole run.
        cover: ``"all"``, or ``"trained"``: leave out parameters that are frozen and in no optimizer.
        sinks: called with every event; see :mod:`tolaria.telemetry.sinks`.
        process_group: ranks that judge the mean of their losses together.

    Raises:
        ValueError: a parameter is not finite, or an argument is out of range.
        TypeError: an argument has the wrong type.
        RuntimeError: several ranks without ``process_group``, sharded parameters, several devices.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer],
        *,
        config: GovernorConfig | None = None,
        num_classes: int | None = None,
        random_guess_loss: float | None = None,
        schedulers: Sequence[Stateful] = (),
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, Stateful] | None = None,
        generators: Sequence[torch.Generator] = (),
        schedules: ScheduleChoice = "rewind",
        cover: Cover = "all",
        sinks: Sequence[Sink] = (),
        process_group: ProcessGroup | None = None,
    ) -> None:
        parts = Parts.checked(
            model, optimizers,
            schedulers=schedulers, scaler=scaler, extras=extras, generators=generators,
            schedules=schedules, cover=cover,
        )  # fmt: skip
        check_optional("config", config, GovernorConfig)
        check_sinks(sinks)
        check_ranks(process_group)
        config = config or GovernorConfig()
        guess = resolve_random_guess_loss(num_classes, random_guess_loss)
        self._telemetry = Telemetry(sinks)
        covered = CoveredState(parts, restore_rng=config.restore_rng)
        self._attached = Attachment(covered, config, guess, process_group, self._telemetry)
        self._begin()
        uncovered.watch(covered)
        self._telemetry.add([self._engine.attach_event()])
        self._telemetry.deliver()

    def _begin(self) -> None:
        self._latest: Verdict | None = None
        self._is_judged_ahead = False  # a verdict is out: the step that it is about is under way

    @property
    def _engine(self) -> Engine:
        return self._attached.engine

    # -- every step ------------------------------------------------------------------------------------------

    def check_vital_signs(
        self,
        loss: Tensor | float,
        *,
        nonfinite: Tensor | bool | None = None,
        gradient_norm: Tensor | float | None = None,
    ) -> Verdict:
        """Judge a loss and update the statistics, without acting on it.

        Args:
            loss: one value: a tensor of any floating dtype on the model's device, or a number.
            nonfinite: judge as NaN whatever ``loss`` is, if true (a flag, or a ``found_inf`` tensor).
            gradient_norm: judge this norm beside the loss, one value as for ``loss``: for instance what
                ``clip_grad_norm_`` returned, which is the norm before clipping. None: the norm of the
                gradients as they are now if ``config.gradient_norm`` is set, else none.

        Returns:
            The verdict, true when a rollback is called for. Pass it to :meth:`step` after the optimizer step.

        Raises:
            TypeError: ``loss`` is neither a number nor a floating tensor.
            ValueError: ``loss`` has more than one element, or is on another device.
        """
        at = self._attached
        at.judge.judge(at.engine, loss, nonfinite, gradient_norm)
        self._is_judged_ahead = True
        self._latest = verdict = Verdict(at.row.state[:_VERDICT_FIELDS, 0].clone())
        if at.skipper is not None:
            at.skipper.after_verdict(at.row.state[StateField.reason])
        return verdict

    def step(
        self,
        loss: Tensor | float | Verdict,
        *,
        nonfinite: Tensor | bool | None = None,
        gradient_norm: Tensor | float | None = None,
    ) -> None:
        """Judge (unless given the verdict just returned), restore if ordered, capture if due.

        Args:
            loss: the loss this optimizer step was computed from (with accumulation the mean of its
                micro-batches), or the :class:`Verdict` that :meth:`check_vital_signs` just returned for it.
            nonfinite: as for :meth:`check_vital_signs`; not together with a verdict.
            gradient_norm: likewise.

        Raises:
            TypeError, ValueError: as :meth:`check_vital_signs`; also for a verdict that is not the latest.
            TrainingDivergedError: rollbacks come too often.
        """
        at = self._attached
        plain = at.plain
        if plain is not None and isinstance(loss, Tensor) and nonfinite is None and gradient_norm is None:
            state, settings, mailbox, reader, engine, skipper = plain
            optimizers, structure = engine.covered.optimizers, engine.structure
            must_act = judge_(state, settings, loss, None, mailbox, None, reader.told, optimizers, structure)
            self._latest = None
        else:
            engine, skipper = at.engine, at.skipper
            if isinstance(loss, Verdict):
                check_verdict(loss, self._latest, nonfinite=nonfinite, gradient_norm=gradient_norm)
                must_act = True
            else:
                must_act = at.judge.judge(engine, loss, nonfinite, gradient_norm)
                self._latest = None
        self._is_judged_ahead = False
        if must_act or (engine.seed_holders and engine.seeds_are_due()):
            self._finish_step(engine)
        elif skipper is not None:
            skipper.after_step()

    @one_thread
    def _finish_step(self, engine: Engine) -> None:
        try:
            engine.act()
            self._attached.mark_step()
        finally:
            self._follow()
        engine.finished()
        self._attached.saver.save_if_due(self._attached.start_saving)
        self._tell()

    def _follow(self) -> None:
        """The end of a step: the host does its share of what the device has done."""
        self._attached.follower.end_step()

    def _tell(self) -> None:
        """Tell the sinks, once everything is done; then end a run that makes no progress."""
        self._attached.choose_way()
        self._telemetry.deliver()
        self._attached.policy.check_budget()

    def begin_step(self) -> None:
        """Head of a step that is being recorded in a CUDA graph; does nothing elsewhere.

        Recorded here, the capture that the step before ordered runs beside this step's forward and backward;
        without it, it is recorded where :meth:`step` is, after the optimizer step, and overlaps nothing.
        """
        self._engine.begin_step()

    # -- by hand ---------------------------------------------------------------------------------------------

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
        try:
            if last is not None and (last.step, last.rollback_count) == now:
                engine.restore_again()
                engine.has_restored_again = True  # what is done to the rates then is done to them again
            else:
                engine.rollback()
                engine.synchronize()
        finally:
            self._follow()
        at.mark_step()
        self._tell()
        assert self.last_report is not None
        return self.last_report

    @one_thread
    def snapshot(self) -> None:
        """Capture now, on probation; it replaces a candidate, never the last known good state.

        Raises:
            SnapshotError: the state cannot be captured; the candidate is what it was then.
        """
        at, engine = self._attached, self._engine
        at.refuse_recording("snapshot")
        try:
            engine.snapshot()
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
        """Let go of the model, the hooks and the slots; calls but ``poll`` are errors.

        A rollback that the host has not heard of yet is heard of, and followed; saves are waited for.
        """
        at = self._attached
        if at.running is None:
            return
        at.refuse_recording("close")
        covered = at.running.covered
        try:
            at.catch_up()  # sync: nothing is heard of later
            at.saver.finish(at.start_saving)
        finally:
            uncovered.unwatch(covered)
            at.close()
        self._telemetry.deliver()

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
        uncovered.dismiss(optimizer)
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
