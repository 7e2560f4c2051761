"""The watchdog of one training run."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria.errors import TolariaError
from tolaria.governor import attach, statistics
from tolaria.governor.config import GovernorConfig
from tolaria.governor.distributed import agree, check_ranks
from tolaria.governor.events import GovernorEvent, MailboxReader, RollbackEvent
from tolaria.governor.policy import RollbackPolicy
from tolaria.governor.sinks import Sink, deliver
from tolaria.governor.skipping import StepSkipper
from tolaria.governor.tracked import Stateful, TrackedState
from tolaria.governor.verdict import GovernorReport, Verdict
from tolaria.ops import Order, StateField, StatusField

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_VERDICT_FIELDS = StateField.reward + 1
_MAX_EVENTS_KEPT = 4096


class TolariaGovernor:
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

    Attaching captures the current state and makes it the last known good one; two slots of the whole state
    are allocated then (for AdamW 6x the parameters), and :meth:`poll` reports their size.

    Args:
        model: parameters and buffers to cover; all on one device.
        optimizers: one optimizer or several; all their state and hyper-parameters are covered.
        config: settings; None means :class:`GovernorConfig` with its defaults.
        num_classes: for a classifier; the random-guess loss is then ``ln(num_classes)``.
        random_guess_loss: loss of guessing, in the loss' unit; overrides ``num_classes``. Without either the
            lobotomy rule is off.
        schedulers: learning-rate schedulers to roll back with the optimizers. One that is not handed over
            goes on from where it is.
        scaler: the ``torch.amp.GradScaler`` in use.
        extras: named objects to roll back too (EMA, sampler): anything with ``state_dict`` and
            ``load_state_dict``.
        generators: random generators beside the default ones, for ``config.restore_rng``.
        sinks: called with every event; see :mod:`tolaria.governor.sinks`.
        process_group: ranks that judge the mean of their losses together.

    Raises:
        ValueError: a parameter is not finite, or an argument is out of range.
        TypeError: an argument has the wrong type.
        RuntimeError: several ranks without ``process_group``, sharded parameters, or parameters on several
            devices.
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
        check_ranks(process_group, model)
        self.config = config or GovernorConfig()
        self.random_guess_loss = attach.resolve_random_guess_loss(num_classes, random_guess_loss)
        self._group = process_group
        self._sinks: list[Sink] = list(sinks)
        self._events: list[GovernorEvent] = []
        self._last_report: GovernorReport | None = None
        self._closed = False
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
        self._build(tracked)
        self._tell(self._engine.attach_event())

    def _build(self, tracked: TrackedState) -> None:
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
        self._engine = attach.make_engine(
            0, self._state, self.config, self._settings, self._mailbox, self._reader, tracked
        )
        self._engine.defer_panics = self._group is not None
        self._reader.skip_all()
        self._policy = RollbackPolicy(self.config, tracked)
        self._scalar = torch.zeros(1, dtype=torch.float64, device=device)
        self._latest: Verdict | None = None
        self._skipper = StepSkipper(self._engine) if self.config.skip_anomalous_steps else None
        if self._skipper is not None:
            weakref.finalize(self, self._skipper.close)

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
        verdict = Verdict(self._state[:_VERDICT_FIELDS, 0].clone())
        self._latest = verdict
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
        if isinstance(loss, Verdict):
            if self._latest is not loss:
                raise ValueError(
                    "loss: expected the verdict that check_vital_signs returned last, got an older one"
                )
            for name, value in (("nonfinite", nonfinite), ("gradient_norm", gradient_norm)):
                if value is not None:
                    raise ValueError(f"{name}: expected None with a verdict, which is judged already")
        else:
            self._judge(loss, nonfinite, gradient_norm)
        for event in self._engine.act():
            self._tell(event)
        if self._skipper is not None:
            self._skipper.after_step()
        self._drain()

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
    ) -> None:
        if self._closed:
            raise TolariaError("governor: it is closed; make a new one")
        if not isinstance(loss, Tensor):
            loss = self._scalar.fill_(attach.as_number("loss", loss))
        if nonfinite is not None and not isinstance(nonfinite, Tensor):
            nonfinite = torch.tensor(bool(nonfinite), device=self._state.device)
        gradient: Tensor | None = None
        if isinstance(gradient_norm, Tensor):
            gradient = gradient_norm
        elif gradient_norm is not None:
            gradient = torch.full_like(self._scalar, attach.as_number("gradient_norm", gradient_norm))
        elif self.config.gradient_norm:
            gradient = self._engine.gradient_stats()
        self._engine.judged()
        if self._group is not None:
            loss, nonfinite, gradient = agree(self._group, self._state, loss, nonfinite, gradient)
        self._latest = None
        ops.governor_step_(self._state, self._settings, loss, nonfinite, None, self._mailbox, gradient)

    # -- by hand ---------------------------------------------------------------------------------------------

    def execute_rollback(self) -> GovernorReport:
        """Restore the last known good state now.

        The reason is the pending one, or MANUAL. If a rollback was already carried out since the last
        judgement, nothing happens and its report is returned again. On CUDA it waits for the device, to
        return the report.

        Raises:
            TrainingDivergedError: rollbacks come too often.
        """
        self._engine.synchronize()  # sync: the report is wanted now
        self._drain()
        last = self._last_report
        if last is None or last.step != self.step_count or last.rollback_count != self.rollback_count:
            self._engine.order(Order.ROLLBACK)
            for event in self._engine.restore():
                self._tell(event)
            self._engine.synchronize()
            self._drain()
            if self._skipper is not None:
                self._skipper.after_step()
        assert self._last_report is not None
        return self._last_report

    def snapshot(self) -> None:
        """Capture now, on probation; it replaces a candidate, never the last known good state."""
        self._engine.order(Order.CAPTURE)
        for event in self._engine.capture():
            self._tell(event)
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
        self._policy = RollbackPolicy(self.config, self._engine.tracked)
        self._drain()

    def wait(self) -> None:
        """Make later work on the current stream wait for a capture in flight (nothing to do on the CPU).

        Call it before changing captured tensors in place outside an optimizer step, and before replaying a
        CUDA graph right after an eager step. It makes the stream wait, not the host.
        """
        self._engine.wait()

    def close(self) -> None:
        """Let go of the model, the hooks and the slots; further calls are an error."""
        if not self._closed:
            self._closed = True
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
        events, self._events = self._events, []
        return events

    def synchronize(self) -> list[GovernorEvent]:
        """Wait until everything ordered so far is done, then :meth:`poll`."""
        self._engine.synchronize()
        return self.poll()

    def add_sink(self, sink: Sink) -> None:
        """Call ``sink`` with every event from now on."""
        self._sinks.append(sink)

    def _tell(self, event: GovernorEvent) -> None:
        self._events.append(event)
        if len(self._events) > _MAX_EVENTS_KEPT:
            del self._events[: _MAX_EVENTS_KEPT // 2]
        deliver(self._sinks, event)

    def _drain(self) -> None:
        if not self._reader.has_news:
            return
        slots = self._engine.slots
        events = list(self._reader.read(slots.names, slots.table.nbytes))
        self._engine.learn(events)
        if self._skipper is not None:
            self._skipper.learn(events)
        self._engine.reconcile()
        for event in events:
            if isinstance(event, RollbackEvent):
                self._last_report = event.report
                self._policy.after_rollback(event.report)
            self._tell(event)
        self._policy.check_budget()

    # -- what it knows: on CUDA as of the last status word that arrived; synchronize() first for the latest --

    @property
    def step_count(self) -> int:
        """Losses judged so far."""
        return self._reader.status(StatusField.step)

    @property
    def rollback_count(self) -> int:
        """Rollbacks so far."""
        return self._reader.status(StatusField.rollback_count)

    @property
    def last_good_step(self) -> int:
        """Step of the last known good capture; 0 is the state at attach."""
        return self._reader.status(StatusField.last_good_step)

    @property
    def last_report(self) -> GovernorReport | None:
        """The last rollback, as far as the host knows."""
        return self._last_report

    @property
    def offending_steps(self) -> tuple[int, ...]:
        """Steps whose losses led to rollbacks, for a sampler to leave out."""
        return tuple(self._policy.offending_steps)

    @property
    def history(self) -> list[float]:
        """The healthy losses of the window, oldest first. On CUDA it waits for the device."""
        return statistics.healthy_losses(self._state, self.config.window)

    @property
    def lifetime(self) -> dict[str, float]:
        """Count, mean, population standard deviation, minimum and maximum of all healthy losses.

        On CUDA it waits for the device.
        """
        return statistics.lifetime_statistics(self._state)

    # -- structure -------------------------------------------------------------------------------------------

    def add_optimizer(self, optimizer: Optimizer) -> None:
        """Cover another optimizer, for instance that of a seed just germinated."""
        attach.checked_optimizers(self._engine.tracked.model, optimizer)
        if optimizer not in self._engine.tracked.optimizers:
            self._engine.tracked.optimizers.append(optimizer)
            self.notify_structure_changed()
            self._engine.hook(optimizer)
            if self._skipper is not None:
                self._skipper.hook(optimizer)

    def remove_optimizer(self, optimizer: Optimizer) -> None:
        """Stop covering an optimizer (one that is not covered is ignored)."""
        self._engine.remove_optimizer(optimizer)

    def add_scheduler(self, scheduler: Stateful) -> None:
        """Cover another learning-rate scheduler."""
        self._engine.tracked.schedulers.append(scheduler)

    def notify_structure_changed(self) -> None:
        """Look at the model's structure now. Optional: the next step, capture or rollback notices growth."""
        for event in self._engine.sync_structure():
            self._tell(event)

    # -- saving ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Settings, statistics and counts; no slots. Safe for ``torch.load`` with ``weights_only``."""
        return statistics.saved_form(self.config, self.random_guess_loss, self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over settings, statistics and counts; the current model state becomes the last known good one.

        Raises:
            ValueError: ``state`` is not from :meth:`state_dict`, or the model's state is not finite.
        """
        config, saved = statistics.read_saved_form(state)
        former, skipper = self._engine, self._skipper
        before = dict(vars(self))
        try:
            self.config, self.random_guess_loss = config, state["random_guess_loss"]
            self._build(former.tracked)
        except Exception:
            vars(self).update(before)
            raise
        former.close()
        if skipper is not None:
            skipper.close()
        statistics.take_over(self._state, saved)
        self._engine.adopt_current_state()
        self._reader.skip_all()
