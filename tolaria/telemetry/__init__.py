"""Telemetry: what a governor tells, in verdicts, reports and events, and who gets to hear it."""

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
    "GovernorEvent",
    "GovernorReport",
    "JsonLinesSink",
    "LoggingSink",
    "PanicReason",
    "Pending",
    "PromotionEvent",
    "ResumeEvent",
    "RollbackEvent",
    "SeedCulledEvent",
    "Sink",
    "StructureEvent",
    "TensorBoardSink",
    "TrackioSink",
    "ValidationEvent",
    "Verdict",
    "VerdictEvent",
    "Verification",
    "WandbSink",
]
