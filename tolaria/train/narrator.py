"""Tells the story of a growing network, phase by phase."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tolaria.errors import TrainingDivergedError
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.slot import SeedSlot
from tolaria.tasks.data import Batch, TaskData
from tolaria.tasks.spec import TaskSpec, TrainSettings
from tolaria.train.epochs import train_epoch_blended, train_epoch_incubator_mode, train_epoch_normal
from tolaria.train.faults import Fault
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
from tolaria.train.step import StepHooks
from tolaria.train.validate import Metrics, validate_and_get_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

    from tolaria.governor import GovernorConfig, GovernorEvent, TolariaGovernor

_LR_FLOOR = 0.01  # the cosine ends at this share of the peak


def governor_config_for(task: TaskSpec, *, strict: bool = False, **changes: Any) -> GovernorConfig:  # noqa: ANN401
    """The governor's settings for a task.

    Args:
        task: whose random-guess loss counts.
        strict: start from :meth:`GovernorConfig.strict` instead of the defaults.
        **changes: fields that are to differ.

    Raises:
        ConfigError: a field is out of range.  TypeError: there is no such field.
    """
    from tolaria.governor import GovernorConfig

    # Chance has two faces where classes are not equally likely: the frequencies, and the uniform guess above.
    if task.guess_loss < 0.95 * math.log(task.num_classes):
        changes.setdefault("lobotomy_band", (0.95, math.inf))
    return GovernorConfig.strict(task.guess_loss, **changes) if strict else GovernorConfig(**changes)


class _Hooks(StepHooks):
    """Between a step and those who look on or meddle."""

    def __init__(self, story: Narrator) -> None:
        self.story = story
        self._now: list[Fault] = []
        self._lr = 0.0

    def before_forward(self) -> None:
        self._now = [fault for fault in self.story.faults if fault.strikes(self.story.step + 1)]
        self._lr = float(self.story.host_optimizer.param_groups[0]["lr"])
        for fault in self._now:
            fault.before_forward(self.story.model)

    def on_loss(self, loss: Tensor) -> Tensor:
        for fault in self._now:
            loss = fault.on_loss(loss)
        return loss

    def after_backward(self) -> None:
        for fault in self._now:
            fault.after_backward(self.story.model)

    def after_step(self, loss: Tensor) -> None:
        self.story.after_step(loss, self._lr)


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
        self.observers, self.faults, self.amp_dtype, self.rng_seed = (
            list(observers),
            list(faults),
            amp_dtype,
            rng_seed,
        )
        self.slot: SeedSlot = model.slot(slot)
        self.result = GrowthResult(spec.name, settings, model, slot)
        self.criterion = spec.criterion()
        self.host_optimizer = AdamW(
            model.host_parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.host_scheduler = self._scheduler(self.host_optimizer, start=0)
        self.seed_optimizer: Optimizer | None = None
        self.seed_scheduler: LambdaLR | None = None
        self.scaler = GradScaler("cuda") if amp_dtype is torch.float16 and device.type == "cuda" else None
        self.governor: TolariaGovernor | None = None
        self.stream = _forever(data)
        self.hooks = _Hooks(self)
        self.interrupts = Interrupts()
        self.phase = "host"
        self.needs_seed = False
        self.step = 0

    def attach_governor(
        self, config: GovernorConfig | None, sinks: Sequence[Callable[[GovernorEvent], object]]
    ) -> None:
        """Put a governor over model, optimizer, scheduler and scaler."""
        from tolaria.governor import TolariaGovernor

        self.governor = TolariaGovernor(
            self.model,
            [self.host_optimizer],
            config=config if config is not None else governor_config_for(self.spec),
            random_guess_loss=self.spec.guess_loss,
            schedulers=[self.host_scheduler],
            scaler=self.scaler,
            sinks=list(sinks),
        )

    def _scheduler(self, optimizer: Optimizer, start: int) -> LambdaLR:
        """Warm-up, then a cosine that ends with the story."""
        total, warmup = self.settings.total_steps, self.settings.warmup_steps

        def factor(step: int) -> float:
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, (start + step) / total)))
            return min(1.0, (step + 1) / (warmup + 1)) * (_LR_FLOOR + (1.0 - _LR_FLOOR) * cosine)

        return LambdaLR(optimizer, factor)

    # ------------------------------------------------------------------ the story

    def tell(self) -> GrowthResult:
        """Run every phase."""
        began = time.perf_counter()
        context = StoryContext(
            task=self.spec, settings=self.settings, model=self.model, governor=self.governor,
            slot=self.slot.name, blueprint=self.settings.blueprint, total_steps=self.settings.total_steps,
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
            self._finish(began)
        if self.result.error is not None:
            raise self.result.error
        if self.interrupts.count and not self.result.interrupted:
            raise KeyboardInterrupt  # it came while a run that had ended was being saved
        return self.result

    def _phases(self) -> None:
        settings, result = self.settings, self.result
        self._run("host", settings.host_steps)
        result.host_test = self._metrics(on_test=True)
        for _ in range(settings.max_germinations):
            too_late = self._left < settings.incubate_steps + settings.blend_steps
            if too_late or result.outcome in ("fossilized", "culled"):
                break
            self._try_seed()
            if result.outcome == "fossilized":
                self._run("finish", self._left)
        if self._left or result.phases[-1].phase != "finish":
            self._run("finish", self._left)
        result.test = self._metrics(on_test=True)

    @property
    def _left(self) -> int:
        """Steps that the story still has."""
        return self.settings.total_steps - self.step

    def _try_seed(self) -> None:
        """Germinate, incubate, blend; then keep the seed or take it out."""
        settings = self.settings
        before = self._metrics()
        self._germinate()
        self.slot.start_training()
        self._tell_seed("learns from detached features")
        self._run("incubate", settings.incubate_steps)
        if not self._is_dropped():
            before = self._metrics() if settings.incubate_steps else before
            self.slot.start_blending(settings.blend_steps, settings.alpha_kind)
            self._tell_seed("alpha rises")
            self._run("blend", settings.blend_steps)
        if self._is_dropped():
            return
        after = self._metrics()
        with self.slot.bypassed():
            without = self._metrics()
        gain, share = before.val_loss - after.val_loss, without.val_loss - after.val_loss
        figures = f"validation loss {before.val_loss:.4f} -> {after.val_loss:.4f}"
        figures += f" ({without.val_loss:.4f} without it)"
        if gain >= settings.min_gain * before.val_loss and share > 0:
            self.slot.fossilize()
            self.result.outcome = "fossilized"
            if self.governor is not None:  # soon a rollback no longer takes the seed away
                self.governor.snapshot()
            self._tell_seed(f"earned its place: {figures}")
        else:
            self.slot.cull()
            self._release_seed("culled", f"did not earn its place: {figures}")

    def _germinate(self) -> None:
        settings = self.settings
        self.model.germinate(
            self.slot.name,
            settings.blueprint,
            rng_seed=self.rng_seed * 1000 + self.slot.generation,
            options=settings.blueprint_options,
        )
        self.seed_optimizer = AdamW(
            self.model.seed_parameters(self.slot.name),
            lr=settings.seed_lr,
            weight_decay=settings.weight_decay,
        )
        self.seed_scheduler = self._scheduler(self.seed_optimizer, start=self.step)
        if self.governor is not None:
            self.governor.add_optimizer(self.seed_optimizer)
            self.governor.add_scheduler(self.seed_scheduler)
            self.governor.notify_structure_changed()
        birth = "the identity" if self.slot.born_as_identity else "not the identity"
        self._tell_seed(f"grafted, {birth} at birth")

    def _is_dropped(self) -> bool:
        """Whether the phase began with a seed that a rollback has taken since."""
        return self.needs_seed and self.slot.seed is None

    def _release_seed(self, outcome: str, reason: str) -> None:
        """The seed is gone: so are its optimizer and scheduler."""
        if self.governor is not None and self.seed_optimizer is not None:
            self.governor.remove_optimizer(self.seed_optimizer)
            self.governor.notify_structure_changed()
        self.seed_optimizer, self.seed_scheduler = None, None
        self.result.outcome = outcome
        self._tell_seed(reason)

    # ------------------------------------------------------------------ running

    def _run(self, phase: str, steps: int) -> None:
        """One phase, in pieces between looks at the validation data."""
        self.phase = phase
        start, began = self.step, time.perf_counter()
        for observer in self.observers:
            observer.on_phase_start(phase, start)
        goal, every = start + steps, self.settings.validate_every
        self.needs_seed = self.slot.seed is not None
        while self.step < goal and not self._is_dropped():
            self._train(min(goal, (self.step // every + 1) * every) - self.step)
            self._validate()
        record = PhaseRecord(
            phase=phase, start_step=start, end_step=self.step, seconds=time.perf_counter() - began
        )
        self.result.phases.append(record)
        for observer in self.observers:
            observer.on_phase_end(record)
        if self._is_dropped():
            self._release_seed("dropped", "a rollback returned to a state without it")

    def _train(self, steps: int) -> None:
        settings = self.settings
        batches: Iterator[Batch] = itertools.islice(self.stream, steps * settings.accumulation_steps)
        schedulers = [s for s in (self.host_scheduler, self.seed_scheduler) if s is not None]
        if self.needs_seed:
            batches = itertools.takewhile(lambda _: not self._is_dropped(), batches)
        if self.seed_optimizer is None:
            train_epoch_normal(
                self.model, batches, self.criterion, self.host_optimizer, self.device, self.spec.task_type,
                governor=self.governor, accumulation_steps=settings.accumulation_steps,
                max_grad_norm=settings.max_grad_norm, amp_dtype=self.amp_dtype, scaler=self.scaler,
                schedulers=schedulers, hooks=self.hooks,
            )  # fmt: skip
            return
        loop = train_epoch_incubator_mode if self.phase == "incubate" else train_epoch_blended
        loop(
            self.model, batches, self.criterion, self.host_optimizer, self.seed_optimizer, self.device,
            self.spec.task_type, governor=self.governor, accumulation_steps=settings.accumulation_steps,
            max_grad_norm=settings.max_grad_norm, seed_max_grad_norm=settings.seed_max_grad_norm,
            amp_dtype=self.amp_dtype, scaler=self.scaler, schedulers=schedulers, hooks=self.hooks,
        )  # fmt: skip

    def after_step(self, loss: Tensor, lr: float) -> None:
        """Called by the hooks: count, and tell."""
        self.step += 1
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

    def _metrics(self, *, on_test: bool = False) -> Metrics:
        return validate_and_get_metrics(
            self.model, self.data.train, self.data.test if on_test else self.data.validation, self.criterion,
            self.device, task_type=self.spec.task_type, train_batches=0, amp_dtype=self.amp_dtype,
        )  # fmt: skip

    def _validate(self) -> None:
        record = ValidationRecord(step=self.step, phase=self.phase, metrics=self._metrics())
        self.result.validations.append(record)
        for observer in self.observers:
            observer.on_validation(record)

    def _tell_last_events(self, governor: TolariaGovernor) -> None:
        try:
            events = governor.synchronize()
        except TrainingDivergedError as error:
            self.result.error = error
            return
        for observer in self.observers:
            observer.on_events(events)

    def _finish(self, began: float) -> None:
        result = self.result
        if self.governor is not None:
            result.rollbacks = self.governor.rollback_count
            self._tell_last_events(self.governor)
            self.governor.close()
        result.steps, result.seconds = self.step, time.perf_counter() - began
        for observer in self.observers:
            observer.on_finish(result)


def _forever(data: TaskData) -> Iterator[Batch]:
    """Epoch after epoch."""
    while True:
        yield from data.train
