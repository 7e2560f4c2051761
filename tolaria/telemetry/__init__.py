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
    VerdictEvent,
)
from tolaria.telemetry.sinks import JsonLinesSink, LoggingSink, Sink, TensorBoardSink
from tolaria.telemetry.verdict import GovernorReport, Verdict

__all__ = [
    "AcceptanceEvent",
    "AttachEvent",
    "CaptureEvent",
    "DroppedEventsEvent",
    "GovernorEvent",
    "GovernorReport",
    "JsonLinesSink",
    "LoggingSink",
    "PanicReason",
    "PromotionEvent",
    "ResumeEvent",
    "RollbackEvent",
    "SeedCulledEvent",
    "Sink",
    "StructureEvent",
    "TensorBoardSink",
    "Verdict",
    "VerdictEvent",
]
