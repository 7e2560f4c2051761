"""The exceptions of tolaria, one small tree."""

from __future__ import annotations


class TolariaError(RuntimeError):
    """Root of the errors that tolaria raises for the state of the world (not for a bad argument)."""


class BuildMismatchError(TolariaError):
    """The compiled extension was built for another torch, CUDA or Python than the one that runs."""


class ExtensionMissingError(TolariaError):
    """The compiled extension was asked for but is not built."""


class MissingDependencyError(TolariaError):
    """An optional package is needed for this feature and is not installed."""


class FolderInUseError(TolariaError, ValueError):
    """A folder was named for a run that another run writes to at this moment."""


class ModelFileError(TolariaError):
    """A saved model is damaged, is not one, or does not belong to the task."""


class ModelMissingError(ModelFileError, FileNotFoundError):
    """There is no saved model in a folder, or only one of its two files."""


class SnapshotError(TolariaError):
    """A snapshot cannot be taken or restored."""


class TrainingDivergedError(TolariaError):
    """Too many rollbacks inside the rollback window: restoring again would not help.

    Attributes:
        history: the reports of those rollbacks, oldest first.
    """

    def __init__(self, message: str, history: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.history = history


class ConfigError(ValueError):
    """A configuration is invalid; the message lists every bad field."""


class UncoveredWarning(UserWarning):
    """Something that a rollback would have to put back is not covered; the message names it.

    ``warnings.simplefilter("error", UncoveredWarning)`` turns it into an error at attach.
    """
