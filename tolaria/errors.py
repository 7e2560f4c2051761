"""The exceptions of tolaria, one small tree."""

from __future__ import annotations

from typing import Literal

AtFault = Literal["data", "state", "unknown"]
"""What a run that diverged is put down to."""


class TolariaError(RuntimeError):
    """Root of the errors that tolaria raises for the state of the world (not for a bad argument)."""


class BuildMismatchError(TolariaError):
    """The compiled extension was built for another torch, CUDA or Python than the one that runs."""


class ExtensionMissingError(TolariaError):
    """The compiled extension was asked for but is not built."""


class BuildError(TolariaError):
    """The compiled extension cannot be built here; the message is one sentence that ends with the remedy."""


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
    """Too many rollbacks inside the rollback window, or of one capture: restoring again would not help.

    The message says in a few lines what happened, what was tried, what is at fault, and what to do next.

    Attributes:
        history: the reports of those rollbacks, oldest first.
        at_fault: ``"data"``: it went wrong at the same batch after every restore; ``"state"``: at any batch,
            which is put down to the restored state or the learning rate; ``"unknown"``: neither is plain.
    """

    def __init__(self, message: str, history: tuple[object, ...] = (), at_fault: AtFault = "unknown") -> None:
        super().__init__(message)
        self.history = history
        self.at_fault = at_fault


class ConfigError(ValueError):
    """A configuration is invalid; the message lists every bad field."""


class UncoveredWarning(UserWarning):
    """Something that a rollback would have to put back is not covered; the message names it.

    ``warnings.simplefilter("error", UncoveredWarning)`` turns it into an error at attach.
    """
