"""The watchdog of one training run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.governor import attach, statistics, uncovered
from tolaria.governor.config import GovernorConfig
from tolaria.governor.distributed import agree, agree_on_flag, check_ranks
from tolaria.governor.engine import Engine
from tolaria.governor.events import EventQueue, GovernorEvent, MailboxReader, RollbackEvent
from tolaria.governor.finite_state import would_roll_back
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.readings import Readings
from tolaria.governor.sinks import Sink, deliver
from tolaria.governor.skipping import StepSkipper, remove_hooks
from tolaria.governor.tracked import Stateful, TrackedState
from tolaria.governor.verdict import GovernorReport, Verdict
from tolaria.ops import Order, StateField
from tolaria.ops.governor import judge_

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
        schedulers: learning-rate schedulers to roll back; one not handed over goes on from where it is.
        scaler: the ``torch.amp.GradScaler`` in use.
        extras: named objects to roll back too (EMA, sampler): anything with ``state_dict`` and
            ``load_state_dict``.
        generators: random generators beside the default ones, for ``config.restore_rng``.
        sinks: called with every event; see :mod:`tolaria.governor.sinks`.
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
        self._sinks: list[Sink] = list(sinks)
        self._events = EventQueue()
        self._last_report: GovernorReport | None = None
        tracked = TrackedState(
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
        self._build(tracked)
        uncovered.watch(tracked)
        self._tell([self._engine.attach_event()])

    def _build(self, tracked: TrackedState) -> None:
        self._skipper: StepSkipper | None = None
        device = tracked.device
        self._state = ops.governor_state(1, window=self.config.window, device=device)
        scaler = tracked.scaler
        self._settings = self.config.to_tensor(
            self.random_guess_loss,
            device,
            gradient_may_overflow=scaler is not None and scaler.is_enabled(),
        )
        self._mailbox = attach.make_mailbox(1, self.config.event_capacity, device)
        self._reader = MailboxReader(self._mailbox.numpy()[0], 0, -self.config.death_penalty)
        self._running = attach.make_engine(
            0, self._state, self.config, self._settings, self._mailbox, self._reader, tracked
        )
        self._running.defer_panics = self._group is not None
        self._reader.skip_all()
        # The loss alone is judged, by this rank alone and on the host: a clean step then takes the shortest
        # way, since between a step and the next every Python frame costs 2 to 3 us (cold caches, Zen 3).
        is_plain = self._group is None and not self.config.gradient_norm
        self._is_plain = is_plain and device.type == "cpu" and not self.config.skips_before_rollback
        self._policy = RollbackPolicy(self.config)
        self._scalar = torch.zeros(1, dtype=torch.float64, device=device)
        self._latest: Verdict | None = None
        if self.config.skip_anomalous_steps and not self.config.log_only:
            self._skipper = StepSkipper(self._running)
            weakref.finalize(self, remove_hooks, self._skipper.handles)

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
            self._latest = None
            must_act = judge_(
                self._state,
                self._settings,
                loss,
                None,
                self._mailbox,
                None,
                self._reader.told,
                engine.tracked.optimizers,
                engine.structure,
            )
        elif isinstance(loss, Verdict):
            if self._latest is not loss:
                raise ValueError("loss: expected the verdict that was returned last, got an older one")
            for name, value in (("nonfinite", nonfinite), ("gradient_norm", gradient_norm)):
                if value is not None:
                    raise ValueError(f"{name}: expected None with a verdict, which is judged already")
            must_act = True
        else:
            must_act = self._judge(loss, nonfinite, gradient_norm)
        must_act = must_act or (bool(engine.seed_holders) and engine.seeds_are_due())
        if must_act:
            self._tell(engine.act())
        if self._skipper is not None:
            self._skipper.after_step()
        if must_act:
            self._drain()

    def _mark_step(self) -> None:
        if self._skipper is not None:
            self._skipper.after_step()

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
            nonfinite = torch.tensor(attach.as_flag("nonfinite", nonfinite), device=self._state.device)
        gradient: Tensor | None = None
        if isinstance(gradient_norm, Tensor):
            gradient = gradient_norm
        elif gradient_norm is not None:
            gradient = torch.full_like(self._scalar, attach.as_number("gradient_norm", gradient_norm))
        elif self.config.gradient_norm:
            gradient = engine.gradient_stats()
        engine.judged()
        if self._group is not None:
            loss, nonfinite, gradient = agree(self._group, self._state, loss, nonfinite, gradient)
        state_bad = self._state_flag(engine, loss, nonfinite, gradient)
        self._latest = None
        return judge_(
            self._state,
            self._settings,
            loss,
            nonfinite,
            self._mailbox,
            gradient,
            self._reader.told,
            engine.tracked.optimizers,
            engine.structure,
            state_bad,
        )

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
        self._engine.synchronize()  # sync: the report is wanted now
        self._drain()
        last = self._last_report
        if last is not None and (last.step, last.rollback_count) == (self.step_count, self.rollback_count):
            self._tell(self._engine.restore_again())
            self._policy.apply(self._engine.tracked)
            self._mark_step()
            return last
        self._engine.order(Order.ROLLBACK)
        self._tell(self._engine.restore())
        self._engine.synchronize()
        self._drain()
        self._mark_step()
        assert self._last_report is not None
        return self._last_report

    def snapshot(self) -> None:
        """Capture now, on probation; it replaces a candidate, never the last known good state."""
        self._engine.order(Order.CAPTURE)
        self._tell(self._engine.capture())
        self._drain()

    def reset(self) -> None:
        """Forget all losses and make the current state the last known good one, as at attach.

        Raises:
            ValueError: the current state is not finite; then nothing is forgotten.
        """
        before = self._state.clone()
        self._engine.order(Order.FORGET)
        try:
            self._engine.adopt_current_state()
        except Exception:
            self._state.copy_(before)
            raise
        self._policy = RollbackPolicy(self.config)
        self._drain()

    def wait(self) -> None:
        """Make the current stream, not the host, wait for a capture in flight (nothing to do on the CPU).

        Call it before changing captured tensors in place outside an optimizer step, and before replaying a
        CUDA graph right after an eager step.
        """
        self._engine.wait()

    def close(self) -> None:
        """Let go of the model, the hooks and the slots; calls but ``poll`` are errors."""
        if self._running is not None:
            uncovered.unwatch(self._running.tracked)
            self._let_go()
            self._read_news()
            self._running = self._skipper = None

    def _let_go(self) -> None:
        if self._skipper is not None:
            self._skipper.close()
        self._engine.close()

    # -- telemetry -------------------------------------------------------------------------------------------

    def poll(self) -> list[GovernorEvent]:
        """Events that arrived since the last call, oldest first; never waits.

        Raises:
            TrainingDivergedError: rollbacks come too often.
        """
        self._drain()
        return self._events.take()

    def synchronize(self) -> list[GovernorEvent]:
        """Wait until everything ordered so far is done, then :meth:`poll`."""
        self._engine.synchronize()
        return self.poll()

    def add_sink(self, sink: Sink) -> None:
        """Call ``sink`` with every event from now on."""
        attach.check_listed(sinks=[sink])
        self._sinks.append(sink)

    def _tell(self, events: Iterable[GovernorEvent]) -> None:
        for event in events:
            self._events.add(event)
            deliver(self._sinks, event)

    def _drain(self) -> None:
        if self._reader.has_news:
            self._read_news()
            self._policy.check_budget()

    def _read_news(self) -> None:
        slots = self._engine.slots
        events = list(self._reader.read(slots.names, slots.table.nbytes))
        self._engine.learn(events)
        if self._skipper is not None:
            self._skipper.learn(events)
        try:
            self._engine.reconcile()
        finally:  # an extra that refuses its state takes no event with it
            for event in events:
                if isinstance(event, RollbackEvent):
                    self._last_report = event.report
                self._policy.hear(event, self._engine.tracked)
                self._tell([event])

    # -- structure and saving --------------------------------------------------------------------------------

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Cover another optimizer, for instance that of a seed just germinated."""
        tracked = self._engine.tracked
        if optimizer not in tracked.optimizers:
            tracked.optimizers += attach.checked_optimizers(tracked.model, [optimizer])
            self.notify_structure_changed()
            self._engine.hook(optimizer)
            if self._skipper is not None:
                self._skipper.hook(optimizer)

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering an optimizer (one that is not covered is ignored), and say nothing of its steps."""
        uncovered.dismiss(optimizer)
        self._engine.remove_optimizer(optimizer)

    def add_scheduler(self, scheduler: Stateful) -> None:
        """Cover another learning-rate scheduler."""
        attach.check_listed(schedulers=[scheduler])
        self._engine.tracked.schedulers.append(scheduler)

    def notify_structure_changed(self) -> None:
        """Look at the model's structure now. Optional: the next step, capture or rollback notices growth."""
        self._tell(self._engine.sync_structure())

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
        former, skipper, before = self._engine, self._skipper, dict(vars(self))
        config, saved = statistics.read_saved_form(state)
        guess = attach.resolve_random_guess_loss(None, state["random_guess_loss"])
        try:
            self.config, self.random_guess_loss = config, guess
            self._build(former.tracked)
            statistics.take_over(self._state, saved)
            self._engine.adopt_current_state()
            self._policy.load_saved_form(state["policy"])
        except Exception:
            if self._running is not former:
                self._let_go()
            vars(self).update(before)
            raise
        former.close()
        if skipper is not None:
            skipper.close()
        self._reader.skip_all()
