"""The governor: judge a loss, take snapshots, roll back, tell."""

from typing import TYPE_CHECKING

from tolaria import _moved
from tolaria.governor.bank import GovernorBank
from tolaria.governor.config import GovernorConfig, Preset
from tolaria.governor.governor import TolariaGovernor
from tolaria.governor.optimizer_guard import guard
from tolaria.governor.resume import load_snapshot
from tolaria.ops import PanicReason
from tolaria.telemetry.events import (
    AcceptanceEvent,
    AttachEvent,
    CaptureEvent,
    DroppedEventsEvent,
    GovernorEvent,
    PromotionEvent,
    ResumeEvent,
    RollbackEvent,
    SeedCulledEvent,
    StructureEvent,
    ValidationEvent,
    VerdictEvent,
)
from tolaria.telemetry.loggers import CsvSink, TrackioSink, WandbSink
from tolaria.telemetry.sinks import JsonLinesSink, LoggingSink, Sink, TensorBoardSink
from tolaria.telemetry.verdict import GovernorReport, Pending, Verdict, Verification

__all__ = [
    "AcceptanceEvent",
    "AttachEvent",
    "CaptureEvent",
    "CsvSink",
    "DroppedEventsEvent",
    "GovernorBank",
    "GovernorConfig",
    "GovernorEvent",
    "GovernorReport",
    "JsonLinesSink",
    "LoggingSink",
    "PanicReason",
    "Pending",
    "Preset",
    "PromotionEvent",
    "ResumeEvent",
    "RollbackEvent",
    "SeedCulledEvent",
    "Sink",
    "StructureEvent",
    "TensorBoardSink",
    "TolariaGovernor",
    "TrackioSink",
    "ValidationEvent",
    "Verdict",
    "VerdictEvent",
    "Verification",
    "WandbSink",
    "guard",
    "load_snapshot",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Submodules that have moved."""
        return _moved.submodule(__name__, name)
