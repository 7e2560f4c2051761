"""Who looks on while a network grows: a display, a metrics file, a plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tolaria.errors import TrainingDivergedError
from tolaria.nn.model import MorphogeneticModel
from tolaria.nn.stage import SeedStage
from tolaria.tasks.spec import TaskSpec, TrainSettings
from tolaria.train.validate import Metrics

if TYPE_CHECKING:
    from tolaria.governor import GovernorEvent, TolariaGovernor


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryContext:
    """What a story is about, told once at its beginning."""

    task: TaskSpec
    """The task."""
    settings: TrainSettings
    """How it is trained."""
    model: MorphogeneticModel
    """The network; its slots show where the seed stands."""
    governor: TolariaGovernor | None
    """The governor, if there is one."""
    slot: str
    """Where the seed will be grafted."""
    blueprint: str
    """What will be grafted."""
    total_steps: int
    """Optimizer steps of the whole story."""
    save: Callable[[Path], Future[Path]]
    """Writes a state to go on from to a folder of snapshots: the governor's last known good one, beside
    training; without a governor the one of now, which has to be between two steps."""
    first_step: int = 0
    """Steps that were taken before: the run is resumed."""
    past_events: Sequence[Mapping[str, Any]] = ()
    """What the governor and others had said by then, as ``events.jsonl`` holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step. Tensors are on the device; reading them may wait, keeping alpha needs a clone."""

    step: int
    """Counting from 1; a rollback does not turn it back."""
    phase: str
    """``"host"``, ``"incubate"``, ``"blend"`` or ``"finish"``."""
    loss: Tensor
    """Mean micro-batch loss, 0-dim."""
    alpha: Tensor
    """The slot's own alpha buffer, 0-dim: it changes at the next step."""
    stage: SeedStage
    """The slot's stage after the step."""
    lr: float
    """The host's learning rate in the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """A part of the story."""

    phase: str
    """``"host"``, ``"incubate"``, ``"blend"`` or ``"finish"``."""
    start_step: int
    """Steps taken before it."""
    end_step: int
    """Steps taken when it was over."""
    seconds: float
    """Wall time, validation included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationRecord:
    """A look at the validation data."""

    step: int
    """Steps taken so far."""
    phase: str
    """During which phase."""
    metrics: Metrics
    """What was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedRecord:
    """Something happened to the seed."""

    step: int
    """Steps taken so far."""
    slot: str
    """Where."""
    stage: SeedStage
    """What the slot's stage is now."""
    blueprint: str
    """What was grafted."""
    reason: str
    """Why, in words for people."""


@dataclass(slots=True)
class GrowthResult:
    """What became of the network."""

    task: str
    """The task's name."""
    settings: TrainSettings
    """How it was trained."""
    model: MorphogeneticModel
    """The network as it is at the end."""
    slot: str
    """Where the seed was grafted."""
    outcome: str = "none"
    """``"fossilized"``, ``"culled"`` (it did not earn its place), ``"dropped"`` (by a rollback) or
    ``"none"``."""
    steps: int = 0
    """Optimizer steps taken."""
    seconds: float = 0.0
    """Wall time, validation included."""
    interrupted: bool = False
    """Ctrl-C cut the run short."""
    resumed_at: list[int] = field(default_factory=list)
    """Steps after which the run was resumed."""
    error: TrainingDivergedError | None = None
    """Why the run ended early, if it diverged."""
    rollbacks: int = 0
    """How often the governor put the state back."""
    phases: list[PhaseRecord] = field(default_factory=list)
    """The parts of the story."""
    validations: list[ValidationRecord] = field(default_factory=list)
    """Every look at the validation data."""
    seeds: list[SeedRecord] = field(default_factory=list)
    """What happened to the seeds."""
    host_test: Metrics | None = None
    """On the test data, when the host had trained alone: an earlier step of this run (the end of the first
    phase), no control that took all the steps; that is ``control_test``."""
    test: Metrics | None = None
    """On the test data, at the end."""
    control_test: Metrics | None = None
    """On the test data, of the host alone for the same steps (see :class:`tolaria.train.control.Control`);
    None where no seed was blended in to the end."""


class GrowthObserver:
    """Base class of observers; every method does nothing here. ``on_step`` must not wait for the device."""

    def on_start(self, context: StoryContext) -> None:
        """Before the first step."""

    def on_phase_start(self, phase: str, step: int) -> None:
        """A phase begins after ``step`` steps."""

    def on_step(self, record: StepRecord) -> None:
        """After each optimizer step and the governor's."""

    def on_events(self, events: Sequence[GovernorEvent]) -> None:
        """The governor had something to say."""

    def on_seed(self, record: SeedRecord) -> None:
        """The seed's stage changed."""

    def on_validation(self, record: ValidationRecord) -> None:
        """The validation data was looked at."""

    def on_phase_end(self, record: PhaseRecord) -> None:
        """A phase is over."""

    def on_interrupt(self, step: int) -> None:
        """Ctrl-C ended the run after ``step`` steps; :meth:`on_finish` follows."""

    def on_finish(self, result: GrowthResult) -> None:
        """The story is over, or was cut short; called before any error of the run is raised."""
