"""One column a governor: reading and writing fields by rows, and what the host is told.

The pure-PyTorch side of ``csrc/math/governor_state.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria.reference.governor_layout import (
    ALL_PARTS_DONE,
    MAX_COUNT,
    ConfigField,
    EventKind,
    MemoryField,
    RecordField,
    StateField,
    StatusField,
    memory_row,
    window_of,
)

_S = StateField
Value = Tensor | float


# Whatever bytes a state holds, no write leaves its row: what indexes or counts passes through one of these
# four, as in the C++, where a cast of NaN would be undefined.


def slot_index(slot: Tensor) -> Tensor:
    """Slot 0 or, for whatever is not 0, slot 1."""
    return (slot != 0).to(slot)


def entries_in(size: Tensor, window: int) -> Tensor:
    """How many entries a window of that ``size`` holds: whole, from 0 to ``window``; NaN: none."""
    return size.nan_to_num(nan=0.0).clamp(0, window).trunc()


def parts_in(done: float) -> int:
    """The capture parts that ``candidate_done`` says are copied, a bit each."""
    return int(done) if 0 <= done <= ALL_PARTS_DONE else 0


def ring_place(sequence: float, records: int) -> int:
    """Where in a ring of ``records`` the one with that number goes."""
    return int(sequence) % records if 0 <= sequence <= MAX_COUNT else 0


class Governors:
    """The columns of ``state`` by name; writes select the rows they concern."""

    def __init__(self, state: Tensor, config: Tensor | None, mailbox: Tensor | None) -> None:
        self.state = state
        self.window = window_of(state)
        self.settings = config.unbind() if config is not None else ()
        self.mailbox = mailbox

    def __getitem__(self, field: int) -> Tensor:
        return self.state[field]

    def put(self, field: int, rows: Tensor, value: Value) -> None:
        """Write ``value`` to ``field`` of ``rows``; the others keep their bytes. There is one NaN for all."""
        if isinstance(value, Tensor):
            value = torch.where(value.isnan(), torch.nan, value)
        self.state[field] = torch.where(rows, value, self.state[field])

    def move(self, field: int, rows: Tensor, value: Tensor) -> None:
        """As :meth:`put`, of something stored as it is: a NaN keeps its bytes."""
        self.state[field] = torch.where(rows, value, self.state[field])

    def setting(self, field: ConfigField) -> Tensor:
        """One setting, 0-dim."""
        return self.settings[field]

    def memory(self, field: MemoryField) -> int:
        """The state row of ``field`` in the live memory."""
        return memory_row(0, self.window, field)

    def live(self, field: MemoryField) -> Tensor:
        """``field`` of the live memory."""
        return self.state[self.memory(field)]

    def block(self, which: int) -> Tensor:
        """Memory ``which``: 0 live, 1 and 2 the slots'."""
        return self.state[memory_row(which, self.window, 0) : memory_row(which + 1, self.window, 0)]

    def history(self) -> Tensor:
        """The losses of the live memory, ``(window, n)``, oldest first."""
        return self.block(0)[len(MemoryField) : len(MemoryField) + self.window]

    def gradients(self) -> Tensor:
        """The gradient norms of the live memory, ``(window, n)``, oldest first."""
        return self.block(0)[len(MemoryField) + self.window :]

    def by_slot(self, slot: Tensor, field: StateField) -> Tensor:
        """``field`` of slot 0 or of slot 1 (the field after it), whichever ``slot`` says."""
        return torch.where(slot_index(slot) == 0, self[field], self[field + 1])


def emit(
    g: Governors, rows: Tensor, kind: EventKind, capture_id: Value, capture_step: Value, ticket: Value = 0.0
) -> None:
    """Append a record for each of ``rows`` to the rings; it reads the device, so it is not sync-free."""
    sequence = g[_S.events].clone()
    g.put(_S.events, rows, sequence + 1.0)
    following = g[_S.events]
    if g.mailbox is None or not bool(rows.any()):
        return
    records = (g.mailbox.shape[1] - len(StatusField)) // len(RecordField)
    given = {RecordField.capture_id: capture_id, RecordField.capture_step: capture_step}
    given |= {RecordField.kind: float(kind), RecordField.ticket: ticket}
    filled = {
        f: torch.as_tensor(v, dtype=sequence.dtype, device=sequence.device).expand_as(sequence)
        for f, v in given.items()
    }
    columns = [filled[f] if f in filled else g[StateField[f.name]] for f in RecordField]
    table = torch.stack([column.to(sequence.device) for column in columns], dim=1).to(g.mailbox.device)
    for row in rows.nonzero().flatten().tolist():
        if records:
            start = len(StatusField) + ring_place(float(sequence[row]), records) * len(RecordField)
            g.mailbox[row, start : start + len(RecordField)] = table[row]
        g.mailbox[row, StatusField.events] = following[row]


# Status words: each transition brings those up to date that it changes, before it counts its event.

_VERDICT_WORDS = (StatusField.reason, StatusField.rollback, StatusField.tensor_index)
_SLOT_WORDS = {
    StatusField.last_good_capture: _S.slot_capture_0,
    StatusField.last_good_step: _S.slot_step_0,
    StatusField.last_good_ticket: _S.slot_ticket_0,
}
_COUNTS = (StatusField.capture_count, StatusField.promotion_count, StatusField.due_from)
_ROLLBACK_WORDS = (
    StatusField.restored_capture, StatusField.restored_step, StatusField.restored_ticket,
    StatusField.due_from, StatusField.rollback_count,
)  # fmt: skip


def _tell(g: Governors, rows: Tensor, word: StatusField, value: Tensor) -> None:
    if g.mailbox is not None:
        target = g.mailbox[:, word]
        target.copy_(torch.where(rows, value, target.to(value.device)))


def verdict_words(g: Governors) -> list[Tensor]:
    """What of a verdict stays the same over clean steps, as it is now."""
    return [g[StateField[word.name]].clone() for word in _VERDICT_WORDS]


def write_verdict_status(g: Governors, rows: Tensor, before: list[Tensor]) -> None:
    """The words of a verdict, where they are not what they were before."""
    _tell(g, rows, StatusField.step, g[_S.step])
    for word, old in zip(_VERDICT_WORDS, before, strict=True):
        _tell(g, rows & (g[StateField[word.name]] != old), word, g[StateField[word.name]])


def write_slot_status(g: Governors, rows: Tensor) -> None:
    """What a promotion or the order for a capture changes."""
    for word, field in _SLOT_WORDS.items():
        _tell(g, rows, word, g.by_slot(g[_S.last_good], field))
    for word in _COUNTS:
        _tell(g, rows, word, g[StateField[word.name]])


def write_rollback_status(g: Governors, rows: Tensor) -> None:
    """What a rollback changes."""
    for word in _ROLLBACK_WORDS:
        _tell(g, rows, word, g[StateField[word.name]])


def write_status(g: Governors, rows: Tensor) -> None:
    """All status words of ``rows``."""
    for word in (StatusField.step, *_VERDICT_WORDS):
        _tell(g, rows, word, g[StateField[word.name]])
    write_slot_status(g, rows)
    write_rollback_status(g, rows)
