"""Layout of the governor's tensors: which field lies where. Compared with the compiled side's names.

``state``    float64 ``(STATE_FIELDS + 3 * (MEMORY_FIELDS + 2 * window), n)``, one column a governor: the
             fields, then three memories (live, slot 0, slot 1), each its fields followed by ``window``
             healthy losses, oldest first, and by as many gradient norms.
``config``   float64 ``(CONFIG_FIELDS,)``, shared by the ``n`` governors.
``mailbox``  float64 ``(n, STATUS_FIELDS + records * RECORD_FIELDS)``: status words, then a ring of records.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

StateField = IntEnum(
    "StateField",
    [
        # the last verdict
        "step", "reason", "rollback", "loss", "mean", "std",
        "threshold_absolute", "threshold_statistical", "threshold_multiplier",
        "gradient_norm", "gradient_threshold", "drift", "panics", "tensor_index", "reward",
        # orders for the snapshot ops
        "capture_order_0", "capture_order_1", "restore_order",
        # lifetime statistics and counts: these never go back
        "life_count", "life_mean", "life_m2", "life_min", "life_max",
        "cooldown_left", "rollback_count", "capture_count", "promotion_count", "attached",
        # the double buffer
        "last_good", "candidate", "candidate_done", "candidate_bad", "candidate_healthy", "anchor_step",
        "suspect", "suspect_since", "suspect_count", "due_from",
        "slot_step_0", "slot_step_1", "slot_capture_0", "slot_capture_1", "slot_ticket_0", "slot_ticket_1",
        "restored_capture", "restored_step", "restored_ticket", "steps_lost", "events",
    ],
    start=0,
)  # fmt: skip

MemoryField = IntEnum(
    "MemoryField",
    [
        "history_size", "last_healthy", "consecutive", "lobotomy_pending", "gradient_size",
        "drift_count", "drift_mean", "drift_variance", "drift_sum", "skips",
        "learnt", "learnt_level", "collapse",
        "shift_count", "shift_level", "shift_spread", "shift_top", "shift_fast", "shift_wander",
        "shift_sum", "shift_gradient", "shift_armed", "held",
    ],
    start=0,
)  # fmt: skip

ConfigField = IntEnum(
    "ConfigField",
    [
        "window", "min_history", "absolute_threshold", "sensitivity", "multiplier", "rule_any", "min_std",
        "warmup_bound", "min_panics_before_rollback", "random_guess_loss", "lobotomy_healthy_below",
        "lobotomy_low", "lobotomy_high", "lobotomy_patience", "cooldown", "snapshot_interval", "probation",
        "log_only", "death_penalty", "gradient_multiplier", "gradient_may_overflow",
        "drift_horizon", "drift_slack", "drift_threshold", "skips_before_rollback",
        "lobotomy_classic", "collapse_patience",
        "shift_horizon", "shift_slack", "shift_threshold", "shift_spike", "suspicious_state",
    ],
    start=0,
)  # fmt: skip

StatusField = IntEnum(
    "StatusField",
    [
        "events", "step", "reason", "rollback", "rollback_count", "restored_capture", "restored_step",
        "last_good_capture", "last_good_step", "capture_count", "promotion_count", "tensor_index",
        "due_from", "restored_ticket", "last_good_ticket",
    ],
    start=0,
)  # fmt: skip

RecordField = IntEnum(
    "RecordField",
    [
        "kind", "step", "reason", "rollback", "loss", "mean", "std",
        "threshold_absolute", "threshold_statistical", "threshold_multiplier",
        "gradient_norm", "gradient_threshold", "drift", "panics", "tensor_index",
        "capture_id", "capture_step", "steps_lost", "rollback_count",
        "ticket",
    ],
    start=0,
)  # fmt: skip

VERDICT_FIELDS = StateField.reward + 1
"""The first so many fields of a column are the last verdict."""


class PanicReason(IntEnum):
    """Why a verdict is what it is."""

    HEALTHY = 0
    """The loss joined the window (or was let through during a cooldown)."""
    NON_FINITE = 1
    """The loss was NaN or infinite, or the caller's ``nonfinite`` flag was raised."""
    LOBOTOMY = 2
    """A network that had learnt fell back to the loss of random guessing."""
    ANOMALY = 3
    """The loss exploded: every threshold of the rule tripped."""
    NON_FINITE_STATE = 4
    """A capture found a non-finite value in a tensor that was finite at attach."""
    MANUAL = 5
    """The caller asked for the rollback."""
    GRADIENT_NORM = 6
    """The gradient was not finite, or its norm exploded."""
    DRIFT = 7
    """The losses have been climbing for long, each by little, or stay above their level for good."""
    SUSPICIOUS_STATE = 8
    """A capture found a parameter or buffer far larger than in any promoted capture."""
    VALIDATION = 9
    """What the caller validates collapsed."""


class EventKind(IntEnum):
    """What a record of the mailbox's ring tells."""

    VERDICT = 0
    CAPTURE = 1
    PROMOTION = 2
    ROLLBACK = 3
    ACCEPTANCE = 4


class Order(IntEnum):
    """What ``governor_order_`` can order."""

    ROLLBACK = 0
    CAPTURE = 1
    PROMOTE = 2
    FORGET = 3
    RELEARN = 4
    HOLD = 5
    RELEASE = 6


MAX_WINDOW = 4096
"""Losses in a window at most."""

CAPTURE_PARTS = 2
"""Parts in which a state is captured."""

ALL_PARTS_DONE = 0b11
"""Both capture parts have been copied (bit 0: what others mutate; bit 1: parameters and optimizer state)."""

UNDOES = 2.0
"""Of ``ConfigField.suspicious_state``: 0 is off, 1 tells, this rolls back."""

MAX_COUNT = 2.0**53
"""Above it a float64 does not count on."""


def memory_row(which: int, window: int, field: int) -> int:
    """Row of ``field`` in memory ``which`` (0 live, 1 and 2 the slots'); past the last are the losses."""
    return len(StateField) + which * (len(MemoryField) + 2 * window) + field


def window_of(state: Tensor) -> int:
    """The window length that a state was made for."""
    return ((state.shape[0] - len(StateField)) // 3 - len(MemoryField)) // 2


def governor_state(
    n: int = 1, *, window: int = 20, attached: bool = True, device: torch.device | str = "cpu"
) -> Tensor:
    """State of ``n`` fresh governors.

    Args:
        n: how many, at least 1.
        window: healthy losses remembered, 1 to 4096.
        attached: whether snapshot slots exist; without them a rollback only clears the memory.
        device: where the governors live.

    Returns:
        float64 ``(fields, n)``; rows are contiguous, and for many governors there is a gap between them.

    Raises:
        ValueError: ``n`` or ``window`` out of range.
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1 governor, got {n}")
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window: expected 1 to {MAX_WINDOW} losses, got {window}")
    column = torch.zeros(memory_row(3, window, 0), 1, dtype=torch.float64, device="cpu")
    for field in (
        StateField.tensor_index,
        StateField.capture_order_0,
        StateField.capture_order_1,
        StateField.candidate,
        StateField.candidate_bad,
        StateField.suspect,
        StateField.restored_capture,
        StateField.restored_step,
    ):
        column[field] = -1.0
    column[StateField.attached] = float(attached)
    state = torch.zeros(len(column), _row_stride(n), dtype=torch.float64, device=device)[:, :n]
    return state.copy_(column)


def _row_stride(n: int) -> int:
    """Values from one field's row to the next: an odd number of cache lines once a row fills several.

    At a power of two, as 1024 governors make it, all fields of a governor fall into one set of a first-level
    cache and push each other out: there a step took 462 us packed and 70 us like this (one thread, 32 KiB).
    """
    line = 8
    lines = (n + line - 1) // line
    return n if lines < 8 else (lines | 1) * line


def governor_mailbox(n: int = 1, *, records: int = 64, pin_memory: bool = False) -> Tensor:
    """A mailbox for ``n`` fresh governors with a ring of ``records`` events each: float64, in CPU memory."""
    if records < 1:
        raise ValueError(f"records: expected at least 1, got {records}")
    width = len(StatusField) + records * len(RecordField)
    mailbox = torch.zeros(n, width, dtype=torch.float64, device="cpu", pin_memory=pin_memory)
    for word in (StatusField.tensor_index, StatusField.restored_capture, StatusField.restored_step):
        mailbox[:, word] = -1.0
    return mailbox
