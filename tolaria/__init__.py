"""tolaria: keep networks that grow while they train alive, at no cost."""

from tolaria import _startup  # the first of all imports
from tolaria._backend import backend, current_mode
from tolaria._host_allocator import HostAllocatorTuning, release_host_memory, tune_host_allocator
from tolaria._moved import install as _answer_for_former_paths
from tolaria._version import VERSION as __version__
from tolaria.errors import (
    BuildMismatchError,
    ConfigError,
    ExtensionMissingError,
    FolderInUseError,
    MissingDependencyError,
    ModelFileError,
    ModelMissingError,
    SnapshotError,
    TolariaError,
    TrainingDivergedError,
    UncoveredWarning,
)
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    GovernorEvent,
    GovernorReport,
    PanicReason,
    TolariaGovernor,
    Verdict,
    guard,
    load_snapshot,
)
from tolaria.nn import AlphaSchedule, MorphogeneticModel, SeedSlot, SeedStage, graft
from tolaria.nn.device import validate_device
from tolaria.snapshot.snapshot import Snapshot
from tolaria.tasks import TaskSpec, create_model, get_task, list_tasks, register_task
from tolaria.train import (
    EpochStats,
    train_epoch_blended,
    train_epoch_incubator_mode,
    train_epoch_normal,
    validate_and_get_metrics,
)

__all__ = [
    "AlphaSchedule",
    "BuildMismatchError",
    "ConfigError",
    "EpochStats",
    "ExtensionMissingError",
    "FolderInUseError",
    "GovernorBank",
    "GovernorConfig",
    "GovernorEvent",
    "GovernorReport",
    "HostAllocatorTuning",
    "MissingDependencyError",
    "ModelFileError",
    "ModelMissingError",
    "MorphogeneticModel",
    "PanicReason",
    "SeedSlot",
    "SeedStage",
    "Snapshot",
    "SnapshotError",
    "TaskSpec",
    "TolariaError",
    "TolariaGovernor",
    "TrainingDivergedError",
    "UncoveredWarning",
    "Verdict",
    "__version__",
    "backend",
    "create_model",
    "current_mode",
    "get_task",
    "graft",
    "guard",
    "list_tasks",
    "load_snapshot",
    "register_task",
    "release_host_memory",
    "train_epoch_blended",
    "train_epoch_incubator_mode",
    "train_epoch_normal",
    "tune_host_allocator",
    "validate_and_get_metrics",
    "validate_device",
]

_answer_for_former_paths()
_startup.raise_again()
