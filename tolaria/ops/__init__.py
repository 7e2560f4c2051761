"""Fused ops, usable alone on any model; ``tolaria.backend`` chooses the implementation."""

from tolaria import _extension

if _extension.LOADED:
    from tolaria.ops import _fake as _fake  # registers the shape rules
from tolaria.ops._layout import live_view, slot_view
from tolaria.ops.blend import blend, seed_gate
from tolaria.ops.governor import governor_order_, governor_step_
from tolaria.ops.metrics import ClassificationMetrics, MetricsAccumulator, classification_metrics_
from tolaria.ops.snapshot import (
    SnapshotEntry,
    SnapshotTable,
    snapshot_capture_,
    snapshot_restore_,
)
from tolaria.ops.stats import tensor_stats
from tolaria.ops.straight_through import straight_through
from tolaria.reference.governor_layout import (
    ALL_PARTS_DONE,
    ConfigField,
    EventKind,
    MemoryField,
    Order,
    PanicReason,
    RecordField,
    StateField,
    StatusField,
    governor_mailbox,
    governor_state,
    memory_row,
    window_of,
)
from tolaria.reference.governor_rules import SHIFT_ARMED
from tolaria.reference.magnitude import MagnitudeField
from tolaria.reference.metrics import MetricsField

__all__ = [
    "ALL_PARTS_DONE",
    "SHIFT_ARMED",
    "ClassificationMetrics",
    "ConfigField",
    "EventKind",
    "MagnitudeField",
    "MemoryField",
    "MetricsAccumulator",
    "MetricsField",
    "Order",
    "PanicReason",
    "RecordField",
    "SnapshotEntry",
    "SnapshotTable",
    "StateField",
    "StatusField",
    "blend",
    "classification_metrics_",
    "governor_mailbox",
    "governor_order_",
    "governor_state",
    "governor_step_",
    "live_view",
    "memory_row",
    "seed_gate",
    "slot_view",
    "snapshot_capture_",
    "snapshot_restore_",
    "straight_through",
    "tensor_stats",
    "window_of",
]
