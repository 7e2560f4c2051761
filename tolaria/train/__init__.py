"""Training: one step, three loops, validation, and the whole story of a growing network."""

from tolaria.train.contributions import seed_contributions
from tolaria.train.epochs import (
    EpochStats,
    train_epoch_blended,
    train_epoch_incubator_mode,
    train_epoch_normal,
)
from tolaria.train.faults import Fault, InjectedFault, list_faults, parse_fault
from tolaria.train.learner import Learner
from tolaria.train.observers import (
    GrowthObserver,
    PhaseRecord,
    SeedRecord,
    StepRecord,
    StoryContext,
    ValidationRecord,
)
from tolaria.train.samples import Gain
from tolaria.train.step import StepHooks, StepPlan, StepResult, train_step
from tolaria.train.story import GrowthResult, governor_config_for, grow
from tolaria.train.validate import Metrics, validate_and_get_metrics

__all__ = [
    "EpochStats",
    "Fault",
    "Gain",
    "GrowthObserver",
    "GrowthResult",
    "InjectedFault",
    "Learner",
    "Metrics",
    "PhaseRecord",
    "SeedRecord",
    "StepHooks",
    "StepPlan",
    "StepRecord",
    "StepResult",
    "StoryContext",
    "ValidationRecord",
    "governor_config_for",
    "grow",
    "list_faults",
    "parse_fault",
    "seed_contributions",
    "train_epoch_blended",
    "train_epoch_incubator_mode",
    "train_epoch_normal",
    "train_step",
    "validate_and_get_metrics",
]
