"""Tells the story of a growing network, phase by phase."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tolaria.errors import TrainingDivergedError
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.slot import SeedSlot
from tolaria.tasks.data import Batch, TaskData
from tolaria.tasks.spec import TaskSpec, TrainSettings
from tolaria.train.bookmark import Bookmark, Resumption, seed_bytes
from tolaria.train.control import Control
from tolaria.train.epochs import train_epoch_blended, train_epoch_incubator_mode, train_epoch_normal
from tolaria.train.faults import Fault, FaultHooks
from tolaria.train.interrupt import Interrupts
from tolaria.train.observers import (
    GrowthObserver,
    GrowthResult,
    PhaseRecord,
    SeedRecord,
    StepRecord,
    StoryContext,
    ValidationRecord,
)
from tolaria.train.trained import Trained
from tolaria.train.validate import Metrics, validate_and_get_metrics

if TYPE_CHECKING:
    from tolaria.governor import TolariaGovernor


class Narrator:
    """The state of a run, and its phases as methods; :func:`tolaria.train.grow` makes one and lets it tell.

    Args:
        spec: the task.
        settings: how to train.
        model: the network, on ``device``.
        slot: where to graft.
        data: what to train on.
        device: where to train.
        rng_seed: seeds the seeds.
        observers: who is told.
        faults: what is broken on purpose.
        amp_dtype: autocast dtype, or None.
    """

    def __init__(
        self,
        spec: TaskSpec,
        settings: TrainSettings,
        model: MorphogeneticModel,
        slot: str,
        data: TaskData,
        device: torch.device,
        rng_seed: int,
        observers: Sequence[GrowthObserver],
        faults: Sequence[Fault],
        amp_dtype: torch.dtype | None,
    ) -> None:
        self.spec, self.settings, self.model, self.data, self.device = spec, settings, model, data, device
        self.observers, self.amp_dtype, self.rng_seed = list(observers), amp_dtype, rng_seed
        self.slot: SeedSlot = model.slot(slot)
        self.trained = Trained(model, self.slot, settings, data, device, amp_dtype)
        self.result = GrowthResult(spec.name, settings, model, slot)
        self.criterion = spec.criterion()
        self.hooks = FaultHooks(faults, model, self.trained.host_optimizer, self.begin_step, self.after_step)
        self.interrupts = Interrupts()
        self._past_events: Sequence[Mapping[str, Any]] = ()
        self.phase = ""
        self.phase_start, self.phase_end = 0, 0
        self.needs_seed = False
        self.germinations, self.seed_start = 0, 0
        self.control: Control | None = None
        self._step_batches: list[Batch] = []
        self.step = 0
        self.is_stepping = False
        self._began = self._phase_began = time.perf_counter()

    @property
    def governor(self) -> TolariaGovernor | None:
        """The governor, if there is one."""
        return self.trained.governor

    # ------------------------------------------------------------------ where it stands

    def bookmark(self) -> Bookmark:
        """The place of now; within a step, when the governor captures, that of its end. Waits for nothing."""
        result, now = self.result, time.perf_counter()
        return Bookmark(
            step=self.step + self.is_stepping, phase=self.phase, phase_start=self.phase_start,
            phase_end=self.phase_end, phase_seconds=now - self._phase_began, seconds=now - self._began,
            needs_seed=self.needs_seed, germinations=self.germinations, seed_start=self.seed_start,
            outcome=result.outcome, validations=len(result.validations),
            host_test=result.host_test, phases=list(result.phases),
            seeds=list(result.seeds), slot=self.slot.structure(on_device=True), seed=seed_bytes(self.slot),
            stream=self.slot.rollback_state()["stream"],  # type: ignore[arg-type]
            data=self.trained.stream.place(),
            control=None if self.control is None else self.control.state(),
        )  # fmt: skip

    def go_to(self, resumption: Resumption) -> None:
        """Go on from a saved place, with what was made anew as then; a governor is attached afterwards.

        Raises:
            SnapshotError: the saved state does not fit.
        """
        mark, result, now = resumption.bookmark, self.result, time.perf_counter()
        self.trained.load(resumption.state, mark)
        if mark.control is not None:
            self.control = self._new_control()
            self.control.load(mark.control)
        self._past_events = resumption.events
        self.step, self.phase = mark.step, mark.phase
        self.phase_start, self.phase_end, self.needs_seed = mark.phase_start, mark.phase_end, mark.needs_seed
        self.germinations, self.seed_start = mark.germinations, mark.seed_start
        self._began, self._phase_began = now - mark.seconds, now - mark.phase_seconds
        result.outcome, result.host_test = mark.outcome, mark.host_test
        before = [event["step"] for event in resumption.events if event["kind"] == "resume"]
        result.resumed_at = [*before, mark.step]
        result.phases, result.seeds = list(mark.phases), list(mark.seeds)
        result.validations = list(resumption.validations)

    def save(self, folder: Path) -> Future[Path]:
        """Write a state to go on from; see :meth:`Trained.save`."""
        return self.trained.save(folder, self.bookmark)

    # ------------------------------------------------------------------ the story

    def tell(self) -> GrowthResult:
        """Run every phase; the rest of them, of a story that is resumed."""
        context = StoryContext(
            task=self.spec, settings=self.settings, model=self.model, governor=self.governor,
            slot=self.slot.name, blueprint=self.settings.blueprint, total_steps=self.settings.total_steps,
            save=self.save, first_step=self.step, past_events=self._past_events,
        )  # fmt: skip
        with self.interrupts:
            for observer in self.observers:
                observer.on_start(context)
            try:
                self._phases()
            except KeyboardInterrupt:
                self.result.interrupted = True
            except TrainingDivergedError as error:
                self.result.error = error
            self.interrupts.spare()
            if self.result.interrupted:
                for observer in self.observers:
                    observer.on_interrupt(self.step)
            self._finish()
        if self.result.error is not None:
            raise self.result.error
        if self.interrupts.count and not self.result.interrupted:
            raise KeyboardInterrupt  # it came while a run that had ended was being saved
        return self.result

    def _phases(self) -> None:
        if not self.phase:
            self._enter("host", self.settings.host_steps)
        self._tell_phase()
        while True:
            self._run()
            if self.phase == "host":
                self.result.host_test = self._metrics(on_test=True)
            elif self.phase == "finish" and not self._left:
                break
            self._turn()
            self._tell_phase()
        self.result.test = self._metrics(on_test=True)
        if self.control is not None:
            self.result.control_test = self._metrics(on_test=True, model=self.control.model)

    @property
    def _left(self) -> int:
        """Steps that the story still has."""
        return self.settings.total_steps - self.step

    def _turn(self) -> None:
        """Enter the phase that follows the one that is over."""
        if self.phase == "incubate" and not self._is_dropped():
            self._blend()
        elif self.phase == "blend" and not self._is_dropped():
            self._judge_seed()
        else:
            self._move_on()

    def _move_on(self) -> None:
        if self._may_germinate():
            self._incubate()
        else:
            self._enter("finish", self._left)

    def _may_germinate(self) -> bool:
        settings = self.settings
        is_settled = self.result.outcome in ("fossilized", "culled")
        fits = self._left >= settings.incubate_steps + settings.blend_steps + self._trial_steps
        return fits and not is_settled and self.germinations < settings.max_germinations

    def _incubate(self) -> None:
        settings = self.settings
        self.model.germinate(
            self.slot.name,
            settings.blueprint,
            rng_seed=self.rng_seed * 1000 + self.slot.generation,
            options=settings.blueprint_options,
        )
        self.germinations, self.seed_start = self.germinations + 1, self.step
        self.trained.train_seed(self.step)
        birth = "the identity" if self.slot.born_as_identity else "not the identity"
        self._tell_seed(f"grafted, {birth} at birth")
        self.slot.start_training()
        self._tell_seed("learns from detached features")
        self._enter("incubate", settings.incubate_steps)

    def _blend(self) -> None:
        settings = self.settings
        self.control = self._new_control()
        self.slot.start_blending(settings.blend_steps, settings.alpha_kind)
        self._tell_seed("alpha rises")
        self._enter("blend", settings.blend_steps + self._trial_steps)

    @property
    def _trial_steps(self) -> int:
        """None where the verdict would come too late for the rest of the run to follow from it."""
        settings = self.settings
        return settings.trial_steps if 2 * settings.trial_steps <= settings.finish_steps else 0

    def _new_control(self) -> Control:
        window = self._trial_steps or self.settings.blend_steps // 2
        return Control(self.trained, self.criterion, self.spec, self.amp_dtype, window=window)

    def _judge_seed(self) -> None:
        """Keep the seed that was blended in, or take it out: by the host alone after as many steps."""
        assert self.control is not None, "it is there from where a seed begins to be blended in"
        fit = self.control.gain_in_training()
        held_out = self.control.gain_of(self.model, self.data.validation)
        share = self.settings.min_gain
        figures = (
            f"beside the host alone for the same steps, training loss {fit.loss:.4f} to {fit.other:.4f} "
            f"({fit.mean:+.4f} +- {fit.error:.4f} better), validation {held_out.loss:.4f} to "
            f"{held_out.other:.4f} ({held_out.mean:+.4f} +- {held_out.error:.4f})"
        )
        if fit.is_at_least(share) and held_out.upper >= min(share, 0.0) * abs(held_out.other):
            self.slot.fossilize()
            self.result.outcome = "fossilized"
            self._tell_seed(f"earned its place: {figures}")
            self._enter("finish", self._left)
            if self.governor is not None:  # soon a rollback no longer takes the seed away
                self.governor.snapshot()
        else:
            if self.governor is not None:
                self.governor.wait()  # for a capture that reads what is written to
            self.slot.cull()
            self.control.give_back(self.trained)
            self._release_seed("culled", f"did not earn its place: {figures}; the host goes on as if alone")
            self._move_on()

    def _is_dropped(self) -> bool:
        """Whether the phase began with a seed that a rollback has taken since."""
        return self.needs_seed and self.slot.seed is None

    def _release_seed(self, outcome: str, reason: str) -> None:
        """The seed is gone."""
        self.trained.release_seed()
        if outcome == "dropped":  # the host is back where it was, and the control is not
            self.control = None
        self.result.outcome = outcome
        self._tell_seed(reason)

    # ------------------------------------------------------------------ running

    def _enter(self, phase: str, steps: int) -> None:
        self.phase, self.phase_start, self.phase_end = phase, self.step, self.step + steps
        self.needs_seed = self.slot.seed is not None
        self._phase_began = time.perf_counter()

    def _tell_phase(self) -> None:
        for observer in self.observers:
            observer.on_phase_start(self.phase, self.phase_start)

    def _run(self) -> None:
        """The rest of a phase, in pieces between looks at the validation data."""
        every = self.settings.validate_every
        if self._is_look_due():
            self._validate()
        while self.step < self.phase_end and not self._is_dropped():
            self._train(min(self.phase_end, (self.step // every + 1) * every) - self.step)
            self._validate()
        record = PhaseRecord(
            phase=self.phase, start_step=self.phase_start, end_step=self.step,
            seconds=time.perf_counter() - self._phase_began,
        )  # fmt: skip
        self.result.phases.append(record)
        for observer in self.observers:
            observer.on_phase_end(record)
        if self._is_dropped():
            self._release_seed("dropped", "a rollback returned to a state without it")

    def _is_look_due(self) -> bool:
        """Whether the run was resumed between the last step of a piece and the look after it."""
        looks = self.result.validations
        is_end = self.step == self.phase_end or self.step % self.settings.validate_every == 0
        return is_end and self.step > self.phase_start and not (looks and looks[-1].step == self.step)

    def _train(self, steps: int) -> None:
        settings = self.settings
        batches: Iterator[Batch] = self._batches()
        trained, schedulers = self.trained, self.trained.schedulers
        if self.needs_seed:
            batches = itertools.takewhile(lambda _: not self._is_dropped(), batches)
        if trained.seed_optimizer is None:
            train_epoch_normal(
                self.model, batches, self.criterion, trained.host_optimizer, self.device, self.spec.task_type,
                governor=self.governor, accumulation_steps=settings.accumulation_steps,
                max_grad_norm=settings.max_grad_norm, amp_dtype=self.amp_dtype, scaler=trained.scaler,
                schedulers=schedulers, max_steps=steps, hooks=self.hooks,
            )  # fmt: skip
            return
        loop = train_epoch_incubator_mode if self.phase == "incubate" else train_epoch_blended
        loop(
            self.model, batches, self.criterion, trained.host_optimizer, trained.seed_optimizer, self.device,
            self.spec.task_type, governor=self.governor, accumulation_steps=settings.accumulation_steps,
            max_grad_norm=settings.max_grad_norm, seed_max_grad_norm=settings.seed_max_grad_norm,
            amp_dtype=self.amp_dtype, scaler=trained.scaler, schedulers=schedulers, max_steps=steps,
            hooks=self.hooks,
        )  # fmt: skip

    def _batches(self) -> Iterator[Batch]:
        """Those of the stream; what the coming step has taken is noted for the control."""
        for batch in self.trained.stream:
            if self.control is not None:
                self._step_batches.append(batch)
            yield batch

    def begin_step(self) -> int:
        """Called by the hooks; returns the number of the step."""
        self.is_stepping = True
        if self.control is not None:
            self.control.step(self._step_batches)
            self._step_batches.clear()
        return self.step + 1

    def after_step(self, loss: Tensor, lr: float) -> None:
        """Called by the hooks: count, and tell."""
        self.step, self.is_stepping = self.step + 1, False
        if self.control is not None:
            self.control.note(loss)
        record = StepRecord(
            step=self.step, phase=self.phase, loss=loss, alpha=self.slot.alpha, stage=self.slot.stage, lr=lr
        )
        for observer in self.observers:
            observer.on_step(record)
        self._tell_events()
        self.interrupts.check()

    def _tell_events(self) -> None:
        events = self.governor.poll() if self.governor is not None else []
        if events:
            for observer in self.observers:
                observer.on_events(events)

    def _tell_seed(self, reason: str) -> None:
        record = SeedRecord(
            step=self.step,
            slot=self.slot.name,
            stage=self.slot.stage,
            blueprint=self.settings.blueprint,
            reason=reason,
        )
        self.result.seeds.append(record)
        for observer in self.observers:
            observer.on_seed(record)

    def _metrics(self, *, on_test: bool = False, model: nn.Module | None = None) -> Metrics:
        return validate_and_get_metrics(
            model or self.model, self.data.train, self.data.test if on_test else self.data.validation,
            self.criterion, self.device, task_type=self.spec.task_type, train_batches=0,
            amp_dtype=self.amp_dtype,
        )  # fmt: skip

    def _validate(self) -> None:
        record = ValidationRecord(step=self.step, phase=self.phase, metrics=self._metrics())
        self.result.validations.append(record)
        for observer in self.observers:
            observer.on_validation(record)

    def _tell_last_events(self, governor: TolariaGovernor) -> None:
        try:
            governor.verify()
            events = governor.poll()
        except TrainingDivergedError as error:
            self.result.error = error
            return
        for observer in self.observers:
            observer.on_events(events)

    def _finish(self) -> None:
        result = self.result
        if self.governor is not None:
            self._tell_last_events(self.governor)
            result.rollbacks = self.governor.rollback_count
            self.governor.close()
        result.steps, result.seconds = self.step, time.perf_counter() - self._began
        for observer in self.observers:
            observer.on_finish(result)
