"""The watchdog of one training run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.governor import attach, statistics, uncovered
from tolaria.governor.config import GovernorConfig
from tolaria.governor.distributed import agree, agree_on_flag, check_ranks
from tolaria.governor.engine import Engine
from tolaria.governor.following import Follower
from tolaria.governor.judging import would_roll_back
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.readings import Readings
from tolaria.governor.skipping import StepSkipper, remove_hooks
from tolaria.ops import Order, StateField
from tolaria.ops.governor import judge_
from tolaria.snapshot import graphs
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.events import GovernorEvent
from tolaria.telemetry.mailbox import MailboxReader
from tolaria.telemetry.sinks import Sink
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
        sinks: Sequence[Sink] = (),
        process_group: ProcessGroup | None = None,
    ) -> None:
        listed = attach.checked_optimizers(model, optimizers)
        attach.check_settings(config, scaler)
        attach.check_listed(schedulers=schedulers, extras=extras, generators=generators, sinks=sinks)
        check_ranks(process_group)
        self.config = config or GovernorConfig()
        self.random_guess_loss = attach.resolve_random_guess_loss(num_classes, random_guess_loss)
        self._group = process_group
        self._telemetry = Telemetry(sinks)
        covered = CoveredState(
            model,
            listed,
            schedulers=schedulers,
            scaler=scaler,
            extras=extras,
            generators=generators,
            restore_rng=self.config.restore_rng,
            device=attach.single_device(model, listed),
        )
        self._running: Engine | None = None
        self._build(covered)
        uncovered.watch(covered)
        self._telemetry.add([self._engine.attach_event()])
        self._telemetry.deliver()

    def _build(self, covered: CoveredState) -> None:
        self._skipper: StepSkipper | None = None
        device = covered.device
        self._state = ops.governor_state(1, window=self.config.window, device=device)
        self._settings = self._settings_tensor(covered)
        self._mailbox = attach.make_mailbox(1, self.config.event_capacity, device)
        self._reader = MailboxReader(self._mailbox.numpy()[0], 0, -self.config.death_penalty)
        self._running = attach.make_engine(
            0, self._state, self.config, self._settings, self._mailbox, self._reader, covered
        )
        self._running.defer_panics = self._group is not None
        self._policy = RollbackPolicy(self.config)
        self._follower = Follower(self._reader, self._running, self._policy, self._telemetry)
        # Numbers that are judged are written here, on the device, which a stream does without waiting.
        self._scalar, self._norm = torch.zeros(2, 1, dtype=torch.float64, device=device).unbind()
        self._flag = torch.zeros(1, dtype=torch.bool, device=device)
        self._begin()

    def _begin(self) -> None:
        """Start from a state just adopted, under the settings of now."""
        self._reader.skip_all()
        # The loss alone is judged, by this rank alone and on the host: a clean step then takes the shortest
        # way, since between a step and the next every Python frame costs 2 to 3 us (cold caches, Zen 3).
        is_plain = self._group is None and not self.config.gradient_norm
        is_plain = is_plain and not self.config.skips_before_rollback
        self._is_plain = is_plain and self._state.device.type == "cpu"
        self._latest: Verdict | None = None
        self._is_judged_ahead = False  # a verdict is out: the step that it is about is under way
        skips = self.config.skip_anomalous_steps and not self.config.log_only
        if self._skipper is not None and not skips:
            self._skipper.close()
            self._skipper = None
        elif self._skipper is None and skips:
            self._skipper = StepSkipper(self._engine)
            weakref.finalize(self, remove_hooks, self._skipper.handles)
        self._follower.skipper = self._skipper

    def _settings_tensor(self, covered: CoveredState) -> Tensor:
        overflows = covered.scaler is not None and covered.scaler.is_enabled()
        return self.config.to_tensor(self.random_guess_loss, covered.device, gradient_may_overflow=overflows)

    @property
    def _engine(self) -> Engine:
        if self._running is None:
            raise TolariaError("governor: it is closed; make a new one")
        return self._running

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
        self._judge(loss, nonfinite, gradient_norm)
        self._is_judged_ahead = True
        self._latest = verdict = Verdict(self._state[:_VERDICT_FIELDS, 0].clone())
        if self._skipper is not None:
            self._skipper.after_verdict(self._state[StateField.reason])
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
        engine = self._running or self._engine  # the property says that there is none any more
        if self._is_plain and isinstance(loss, Tensor) and nonfinite is None and gradient_norm is None:
            must_act = judge_(
                self._state,
                self._settings,
                loss,
                None,
                self._mailbox,
                None,
                self._reader.told,
                engine.covered.optimizers,
                engine.structure,
            )
            self._latest = None
        elif isinstance(loss, Verdict):
            if self._latest is not loss:
                raise ValueError("loss: expected the verdict that was returned last, got an older one")
            for name, value in (("nonfinite", nonfinite), ("gradient_norm", gradient_norm)):
                if value is not None:
                    raise ValueError(f"{name}: expected None with a verdict, which is judged already")
            must_act = True
        else:
            must_act = self._judge(loss, nonfinite, gradient_norm)
        self._is_judged_ahead = False
        if must_act or (engine.seed_holders and engine.seeds_are_due()):
            self._finish_step(engine)
        elif self._skipper is not None:
            self._skipper.after_step()

    def _finish_step(self, engine: Engine) -> None:
        try:
            engine.act()
            if self._skipper is not None:
                self._skipper.after_step()
        finally:
            self._follow()
        self._tell()

    def _mark_step(self) -> None:
        if self._skipper is not None:
            self._skipper.after_step()

    def _follow(self) -> None:
        """The end of a step: the host does its share of what the device has done."""
        self._follower.hear()
        self._follower.follow()
        self._follower.mark.set(self._engine.covered)

    def _tell(self) -> None:
        """Tell the sinks, once everything is done; then end a run that makes no progress."""
        self._telemetry.deliver()
        self._policy.check_budget()

    def begin_step(self) -> None:
        """Head of a step that is being recorded in a CUDA graph; does nothing elsewhere.

        Recorded here, the capture that the step before ordered runs beside this step's forward and backward;
        without it, it is recorded where :meth:`step` is, after the optimizer step, and overlaps nothing.
        """
        self._engine.begin_step()

    def _judge(
        self,
        loss: Tensor | float,
        nonfinite: Tensor | bool | None,
        gradient_norm: Tensor | float | None = None,
    ) -> bool:
        """Judge; whether there is anything to carry out or to tell, which is rare."""
        engine = self._engine
        if not isinstance(loss, Tensor):
            loss = self._scalar.fill_(attach.as_number("loss", loss))
        if nonfinite is not None and not isinstance(nonfinite, Tensor):
            nonfinite = self._flag.fill_(attach.as_flag("nonfinite", nonfinite))
        gradient: Tensor | None = None
        if isinstance(gradient_norm, Tensor):
            gradient = gradient_norm
        elif gradient_norm is not None:
            gradient = self._norm.fill_(attach.as_number("gradient_norm", gradient_norm))
        elif self.config.gradient_norm:
            gradient = engine.gradient_stats()
        engine.judging()
        if engine.is_recording():
            graphs.outlive(self._scalar, self._norm, self._flag)
        if self._group is not None:
            loss, nonfinite, gradient = agree(self._group, self._state, loss, nonfinite, gradient)
        state_bad = self._state_flag(engine, loss, nonfinite, gradient)
        must_act = judge_(
            self._state,
            self._settings,
            loss,
            nonfinite,
            self._mailbox,
            gradient,
            self._reader.told,
            engine.covered.optimizers,
            engine.structure,
            state_bad,
        )
        engine.judged()  # not before: a call that was refused has judged nothing
        self._latest = None
        return must_act

    def _state_flag(
        self, engine: Engine, loss: Tensor, nonfinite: Tensor | None, gradient: Tensor | None
    ) -> Tensor | None:
        """Whether the state is not finite, where that decides between letting a step pass and a rollback."""
        if not self.config.skips_before_rollback:
            return None
        if self._state.is_cpu and not bool(
            would_roll_back(self._state, self._settings, loss, nonfinite, None, gradient)
        ):
            return None
        flag = engine.state_check.flag(None if self._skipper is None else self._skipper.put_back_buffers())
        return flag if self._group is None else agree_on_flag(self._group, self._state, flag)

    # -- by hand ---------------------------------------------------------------------------------------------

    def execute_rollback(self) -> GovernorReport:
        """Restore the last known good state now.

        The reason is the pending one, or MANUAL. After a rollback since the last judgement its state is put
        back once more, its report returned again, and nothing counted twice. On CUDA it waits for the device.

        Raises:
            TrainingDivergedError: rollbacks come too often.
        """
        engine = self._engine
        self._refuse_recording("execute_rollback")
        engine.synchronize()  # sync: the report is wanted now
        self._follower.hear()
        self._follower.follow()
        last = self.last_report
        now = self.step_count, self.rollback_count
        try:
            if last is not None and (last.step, last.rollback_count) == now:
                engine.restore_again()
                self._policy.apply(engine.covered)
            else:
                engine.rollback()
                engine.synchronize()
        finally:
            self._follow()
        self._mark_step()
        self._tell()
        assert self.last_report is not None
        return self.last_report

    def _refuse_recording(self, call: str) -> None:
        graphs.refuse_recording(self._engine.covered.device, call)

    def snapshot(self) -> None:
        """Capture now, on probation; it replaces a candidate, never the last known good state.

        Raises:
            SnapshotError: the state cannot be captured; the candidate is what it was then.
        """
        engine = self._engine
        self._refuse_recording("snapshot")
        try:
            engine.snapshot()
        finally:
            self._follower.hear()
            self._follower.follow_between_steps() if engine.is_late else self._follower.follow()
        self._tell()

    def reset(self) -> None:
        """Forget all losses and make the current state the last known good one, as at attach.

        Raises:
            ValueError: the current state is not finite; then nothing is forgotten.
            SnapshotError: the current state cannot be captured; likewise.
        """
        engine = self._engine
        self._refuse_recording("reset")
        engine.synchronize()  # sync: looks at the state as it is
        self._follower.hear()
        self._follower.follow()
        engine.adopt_current_state(partial(engine.order, Order.FORGET))
        self._policy = self._follower.policy = RollbackPolicy(self.config)
        self._follow()
        self._tell()

    def wait(self) -> None:
        """Make the current stream, not the host, wait for a capture in flight (nothing to do on the CPU).

        Call it before changing captured tensors in place outside an optimizer step, and before replaying a
        CUDA graph right after an eager step.
        """
        self._engine.wait()

    def close(self) -> None:
        """Let go of the model, the hooks and the slots; calls but ``poll`` are errors.

        A rollback that the host has not heard of yet is heard of, and followed.
        """
        if self._running is None:
            return
        self._refuse_recording("close")
        self._engine.synchronize()  # sync: nothing is heard of later
        try:
            self._follower.hear()
            self._follower.follow()
        finally:
            uncovered.unwatch(self._running.covered)
            self._let_go()
            self._running = self._skipper = None
            self._follower.engine = self._follower.skipper = None
        self._telemetry.deliver()

    def _let_go(self) -> None:
        if self._skipper is not None:
            self._skipper.close()
        self._engine.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "governor: it watches one model and cannot be copied or pickled; make a new one for the copy and "
            "hand it state_dict()"
        )

    # -- telemetry -------------------------------------------------------------------------------------------

    def poll(self) -> list[GovernorEvent]:
        """Events that arrived since the last call, oldest first; never waits, and may be called anywhere.

        It only tells. Host-side parts and the policy of a rollback that arrives late are for the end of the
        next :meth:`step`; between two steps, in the thread that trains, they are put in place here already. A
        run that ends since rollbacks come too often is ended by the next :meth:`step`, not here.
        """
        self._follower.hear()
        if not self._is_judged_ahead:
            self._follower.follow_between_steps()
        self._telemetry.deliver()
        return self._telemetry.take()

    def synchronize(self) -> list[GovernorEvent]:
        """Wait until everything ordered so far is done, then :meth:`poll`."""
        self._refuse_recording("synchronize")
        self._engine.synchronize()
        return self.poll()

    def add_sink(self, sink: Sink) -> None:
        """Call ``sink`` with every event from now on."""
        attach.check_listed(sinks=[sink])
        self._telemetry.sinks.append(sink)

    # -- structure and saving --------------------------------------------------------------------------------

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Cover another optimizer, for instance that of a seed just germinated.

        Raises:
            TypeError: it is no optimizer.
            SnapshotError: its state cannot be covered; it is not added then.
        """
        covered = self._engine.covered
        if any(known is optimizer for known in covered.optimizers):
            return
        before = list(covered.optimizers)
        covered.optimizers += attach.checked_optimizers(covered.model, [optimizer])
        try:
            self._engine.sync_structure()
        except BaseException:
            covered.optimizers = before
            raise
        self._engine.hook(optimizer)
        if self._skipper is not None:
            self._skipper.hook(optimizer)
        self._follower.hear()
        self._telemetry.deliver()

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering an optimizer (one that is not covered is ignored), and say nothing of its steps."""
        uncovered.dismiss(optimizer)
        self._engine.remove_optimizer(optimizer)

    def add_scheduler(self, scheduler: Stateful) -> None:
        """Cover another learning-rate scheduler."""
        attach.check_listed(schedulers=[scheduler])
        self._engine.covered.schedulers.append(scheduler)

    def notify_structure_changed(self) -> None:
        """Look at the model's structure now. Optional: the next step, capture or rollback notices growth."""
        self._engine.sync_structure()
        self._follower.hear()
        self._telemetry.deliver()

    def state_dict(self) -> dict[str, Any]:
        """Settings, statistics and counts; no slots. Safe for ``torch.load`` with ``weights_only``."""
        policy = self._policy.saved_form()
        return statistics.saved_form(self.config, self.random_guess_loss, self._state, policy)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over settings, statistics and counts; the current model state becomes the last known good one.

        Raises:
            ValueError, TypeError: ``state`` is not from :meth:`state_dict`, or the model is not finite.
            SnapshotError: there is no memory for the new slots. Whatever is raised, nothing has changed.
        """
        engine = self._engine
        self._refuse_recording("load_state_dict")
        config, saved = statistics.read_saved_form(state)
        guess = attach.resolve_random_guess_loss(None, state["random_guess_loss"])
        policy = RollbackPolicy(config)
        policy.load_saved_form(state["policy"])
        engine.synchronize()  # sync: takes the state as it is
        self._follower.hear()
        self._follower.follow()
        before = self.config, self.random_guess_loss
        fits = saved.shape == self._state.shape and all(
            getattr(config, name) == getattr(self.config, name) for name in ("storage", "event_capacity")
        )
        self.config, self.random_guess_loss = config, guess
        try:
            if fits:
                self._renew(engine, saved)
            else:
                self._replace(engine, saved)
        except BaseException:
            self.config, self.random_guess_loss = before
            raise
        self._policy = self._follower.policy = policy
        self._begin()
        self._telemetry.deliver()

    def _renew(self, engine: Engine, saved: Tensor) -> None:
        """Take ``saved`` over in place: recorded graphs go on being judged."""
        settings = self._settings_tensor(engine.covered)

        def take_over() -> None:
            self._settings.copy_(settings)
            statistics.take_over(self._state, saved)

        engine.adopt_current_state(take_over)
        engine.renew(self.config)
        self._reader.set_reward(-self.config.death_penalty)

    def _replace(self, former: Engine, saved: Tensor) -> None:
        """Take ``saved`` over with memory of another size; a recorded graph finds a judge without slots."""
        skipper, before = self._skipper, dict(vars(self))
        try:
            self._build(former.covered)
            self._follower.last_report = before["_follower"].last_report
            self._engine.adopt_current_state(partial(statistics.take_over, self._state, saved))
        except BaseException:
            if self._running is not former:
                self._let_go()
            vars(self).update(before)
            raise
        former.close()
        if skipper is not None:
            skipper.close()
