"""The watchdog of one training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria._arguments import check_optional
from tolaria.governor import uncovered
from tolaria.governor.attachment import Attachment
from tolaria.governor.by_hand import CallsByHand
from tolaria.governor.config import GovernorConfig, resolve_random_guess_loss
from tolaria.governor.distributed import check_ranks
from tolaria.governor.engine import Engine
from tolaria.governor.judging import check_verdict
from tolaria.governor.loss_mean import ADDED
from tolaria.governor.one_thread import one_thread
from tolaria.ops.governor import judge_
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.parts import Cover, Parts, ScheduleChoice
from tolaria.snapshot.protocols import Stateful
from tolaria.telemetry.delivery import Telemetry
from tolaria.telemetry.labels import Tag, as_tag
from tolaria.telemetry.sinks import Sink, check_sinks
from tolaria.telemetry.verdict import Verdict

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TolariaGovernor(CallsByHand):
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
        name: stands on every event, to tell governors apart.

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
        name: str | None = None,
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
        self._telemetry = Telemetry(sinks, name=name)
        covered = CoveredState(parts, restore_rng=config.restore_rng)
        self._attached = Attachment(covered, config, guess, process_group, self._telemetry)
        self._begin()
        uncovered.watch(covered)
        self._telemetry.add([self._engine.attach_event()])
        self._telemetry.deliver()

    # -- every step ------------------------------------------------------------------------------------------

    def check_vital_signs(
        self,
        loss: Tensor | float | None = ADDED,
        *,
        nonfinite: Tensor | bool | None = None,
        gradient_norm: Tensor | float | None = None,
        tag: Tag | None = None,
    ) -> Verdict:
        """Judge a loss and update the statistics, without acting on it.

        Args:
            loss: one value: a tensor of any floating dtype on the model's device, or a number. None: there is
                none, and the gradients' norm and the state are judged alone; the window of losses stays as it
                is. Nothing at all: the mean of what :meth:`add_loss` was given.
            nonfinite: judge as NaN whatever ``loss`` is, if true (a flag, or a ``found_inf`` tensor).
            gradient_norm: judge this norm beside the loss, one value as for ``loss``: for instance what
                ``clip_grad_norm_`` returned, which is the norm before clipping. None: the norm of the
                gradients as they are now if ``config.gradient_norm`` is set or ``loss`` is None, else none.
            tag: as for :meth:`step`.

        Returns:
            The verdict, true when a rollback is called for. Pass it to :meth:`step` after the optimizer step.

        Raises:
            TypeError: ``loss`` is neither a number nor a floating tensor; ``tag`` is no int and no str.
            ValueError: ``loss`` has more than one element, is on another device, or comes beside added ones.
        """
        at = self._attached
        self._judge(at, loss, nonfinite, gradient_norm, tag, is_ahead=True)
        self._is_judged_ahead = True
        self._latest = verdict = Verdict(at.row.verdict_fields())
        if at.skipper is not None:
            at.skipper.after_verdict(at.row.state)
        return verdict

    def _judge(
        self,
        at: Attachment,
        loss: Tensor | float | None,
        nonfinite: Tensor | bool | None,
        gradient_norm: Tensor | float | None,
        tag: Tag | None,
        *,
        is_ahead: bool = False,
    ) -> bool:
        if loss is ADDED or at.judge.losses.count:
            loss = at.judge.losses.instead_of(loss)
        engine, labels = at.engine, self._telemetry.labels
        step = engine.enqueued_step + 1
        if tag is not None:  # before, since another thread may hear of the step while it is judged
            labels.note(step, as_tag(tag))
        try:
            must_act = at.judge.judge(engine, loss, nonfinite, gradient_norm, is_ahead=is_ahead)
        except BaseException:
            labels.forget(step)
            raise
        if at.judge.losses.count:
            at.expect_loss()
        return must_act

    def add_loss(self, loss: Tensor | float, weight: Tensor | float = 1) -> None:
        """Count the loss of a micro-batch in; :meth:`step` without a loss then judges the weighted mean.

        It is added up in float64 on the device, and nothing waits. What was added is judged once; a rollback
        by hand drops it.

        Args:
            loss: one value, as for :meth:`check_vital_signs`, not divided by the number of micro-batches.
            weight: how much it counts, a number or a tensor of one value on the model's device: its samples,
                or its tokens. One of weight 0 is left out, even if its loss is NaN; of all, the mean is NaN.

        Raises:
            TypeError: one is neither a number nor a tensor of numbers.
            ValueError: one has more than one element, is on another device, or is a negative weight.
        """
        at = self._attached
        at.engine  # noqa: B018 (raises if it is closed)
        at.judge.losses.add(loss, weight)
        at.plain = None

    def step(
        self,
        loss: Tensor | float | Verdict | None = ADDED,
        *,
        nonfinite: Tensor | bool | None = None,
        gradient_norm: Tensor | float | None = None,
        tag: Tag | None = None,
    ) -> None:
        """Judge (unless given the verdict just returned), restore if ordered, capture if due.

        Args:
            loss: the loss this optimizer step was computed from (with accumulation the mean of its
                micro-batches), or the :class:`Verdict` that :meth:`check_vital_signs` just returned for it.
                None, or nothing at all: as for :meth:`check_vital_signs`.
            nonfinite: as for :meth:`check_vital_signs`; not together with a verdict.
            gradient_norm: likewise.
            tag: what you call this step (a global step, an id), a whole number or a string. It stands on
                every event of the step, and in the report of a rollback.

        Raises:
            TypeError, ValueError: as :meth:`check_vital_signs`; also for a verdict that is not the latest.
            TrainingDivergedError: rollbacks come too often.
        """
        at = self._attached
        plain = at.plain
        if plain is not None and isinstance(loss, Tensor) and nonfinite is gradient_norm is tag is None:
            state, settings, mailbox, reader, engine, skipper = plain
            optimizers, structure = engine.covered.optimizers, engine.structure
            must_act = judge_(state, settings, loss, None, mailbox, None, reader.told, optimizers, structure)
            self._latest = None
        else:
            engine, skipper = at.engine, at.skipper
            if isinstance(loss, Verdict):
                check_verdict(loss, self._latest, nonfinite=nonfinite, gradient_norm=gradient_norm)
                at.judge.losses.refuse_beside("a verdict")
                if tag is not None:
                    self._telemetry.labels.note(engine.enqueued_step, as_tag(tag))
                at.judge.step_ended()
                must_act = True
            else:
                must_act = self._judge(at, loss, nonfinite, gradient_norm, tag)
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
            self._attached.captures.end_step()
        finally:
            self._follow()
        engine.finished()
        self._attached.saver.save_if_due(self._attached.start_saving)
        self._tell()

    def begin_step(self) -> None:
        """Head of a step that is being recorded in a CUDA graph; does nothing elsewhere.

        Recorded here, the capture that the step before ordered runs beside this step's forward and backward;
        without it, it is recorded where :meth:`step` is, after the optimizer step, and overlaps nothing.
        """
        self._engine.begin_step()
