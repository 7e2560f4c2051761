"""tolaria: keep networks that grow while they train alive, at no cost."""

from tolaria._backend import backend, current_mode
from tolaria.errors import (
    BuildMismatchError,
    ConfigError,
    ExtensionMissingError,
    MissingDependencyError,
    SnapshotError,
    TolariaError,
    TrainingDivergedError,
)
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    GovernorEvent,
    GovernorReport,
    PanicReason,
    TolariaGovernor,
    Verdict,
)

__version__ = "0.1.0"

__all__ = [
    "BuildMismatchError",
    "ConfigError",
    "ExtensionMissingError",
    "GovernorBank",
    "GovernorConfig",
    "GovernorEvent",
    "GovernorReport",
    "MissingDependencyError",
    "PanicReason",
    "SnapshotError",
    "TolariaError",
    "TolariaGovernor",
    "TrainingDivergedError",
    "Verdict",
    "__version__",
    "backend",
    "current_mode",
]
