"""Snapshot ops: copy any number of tensors to the ordered slot, or back from the last known good one.

Source: csrc/cpu/snapshot.cpp · reference: tolaria.reference.snapshot · bench: bench/ops/bench_snapshot.py
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria import _backend
from tolaria.ops._layout import runs
from tolaria.reference import snapshot as reference
from tolaria.reference.magnitude import MagnitudeField

_CHECK_KIND = {
    torch.float32: 1,
    torch.complex64: 1,
    torch.float64: 2,
    torch.complex128: 2,
    torch.float16: 3,
    torch.bfloat16: 4,
    torch.float8_e4m3fn: 6,
    torch.float8_e5m2: 7,
}
_ZEROED = 5
_COLUMNS = 7
_HEADER_ROWS = 2
_NO_TENSOR = 2**63 - 1
_ELSEWHERE, _MAGNITUDES = slice(6, 8), slice(8, 10)
"""Words of the header: an address, and how many there is room for."""
_BLOCK_BYTES = 1 << 16
"""Most bytes of a row on CUDA: a fair share for one block (256 16-byte words a thread group)."""


@dataclass(frozen=True)
class SnapshotEntry:
    """One captured tensor."""

    live: Tensor
    """What is copied from and back to; see :func:`live_view`."""
    slots: tuple[Tensor, Tensor]
    """Where to, in either slot; see :func:`slot_view`."""
    part: int
    """0: copied at once, on the current stream; 1: may be copied later, on a side stream."""
    report_index: int
    """What a capture reports when it finds a non-finite value here; -1: not looked for."""
    zeroed: bool = False
    """A capture writes zeros instead, so that a restore brings zeros: the alpha of a seed to be dropped."""
    birth: int = 0
    """Above 0: its magnitude is judged, by a history under ``report_index``, which begins anew with another
    birth; of one tensor it is always the same number."""


@dataclass(frozen=True, eq=False)
class PreparedRows:
    """What a table is to hold, worked out but not in effect; see :meth:`SnapshotTable.prepare`."""

    entries: tuple[SnapshotEntry, ...]
    """By part."""
    matrix: Tensor
    """int64 ``(2 + rows, 7)``: the header and the rows; page-locked if the table is on CUDA."""
    data: Tensor
    """The memory of the table that the matrix goes to; the matrix itself on the CPU."""
    elsewhere: Tensor | None = None
    """Where the rows go, if they have outgrown that memory."""
    magnitudes: Tensor | None = None
    """See :attr:`SnapshotTable.magnitudes`."""


class SnapshotTable:
    """Addresses of everything that a capture or a restore touches; owns the tensors it points to.

    The compiled ops read no row outside ``data``, but nobody can check an address: write no rows yourself.

    Attributes:
        data: int64 ``(2 + capacity, 7)`` on ``device``, what the compiled ops read: a header, then the rows
            of part 0, then of part 1, then spare room. On CUDA it never moves, since recorded graphs know its
            address: rows that outgrow it lie elsewhere, and the header says where.
        entries: the tensors behind the rows.
        magnitudes: float64 ``(tensors, 12)`` on ``device``, by report index: how large each tensor was, in
            either slot and in promoted captures (``tolaria.reference.magnitude.MagnitudeField``). None: no
            entry has a birth. Captures write to it.
    """

    def __init__(self, entries: Sequence[SnapshotEntry] = (), *, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        empty = torch.zeros(_HEADER_ROWS, _COLUMNS, dtype=torch.int64, device=self.device)
        self._rows = PreparedRows((), empty, empty)
        self._on_the_way: tuple[object, ...] = ()
        self._outside: list[Tensor] = []
        """Room for rows outside, each twice the one before; none goes, since a replay may be reading it."""
        self._outgrown: list[Tensor] = []
        """Of magnitudes; likewise."""
        self.update(entries)

    @property
    def data(self) -> Tensor:
        """What the compiled ops read."""
        return self._rows.data

    @property
    def entries(self) -> tuple[SnapshotEntry, ...]:
        """The tensors behind the rows, by part."""
        return self._rows.entries

    @property
    def magnitudes(self) -> Tensor | None:
        """How large each tensor was."""
        return self._rows.magnitudes

    @property
    def memory(self) -> list[Tensor]:
        """What captures and restores read and write beside the tensors: :attr:`data`, :attr:`magnitudes`."""
        return [self.data] if self.magnitudes is None else [self.data, self.magnitudes]

    def holds(self, rows: PreparedRows) -> bool:
        """Whether ``rows`` were adopted last, and wholly."""
        return self._rows is rows and not self._on_the_way

    def update(self, entries: Sequence[SnapshotEntry]) -> None:
        """Replace the entries; in place, at the same address, wherever the spare room suffices.

        On CUDA the new rows are uploaded on the current stream, from page-locked memory, without waiting.

        Raises:
            ValueError: a tensor lies where the table's device cannot reach it; nothing is changed then.
        """
        self.adopt(self.prepare(entries))

    def prepare(self, entries: Sequence[SnapshotEntry]) -> PreparedRows:
        """The first half of :meth:`update`: all that can fail. The table stays what it is.

        Raises:
            ValueError: as :meth:`update`.
        """
        self._check_devices(entries)
        by_part = tuple(sorted(entries, key=lambda entry: entry.part))
        parts = [[row for e in by_part if e.part == part for row in self._rows_of(e)] for part in (0, 1)]
        rows = sum(map(len, parts))
        header = [[len(parts[0]), rows, 0, 0, _NO_TENSOR, _NO_TENSOR, 0], [0] * _COLUMNS]
        matrix = torch.tensor([*header, *parts[0], *parts[1]], dtype=torch.int64, device="cpu")
        words, magnitudes = matrix[:_HEADER_ROWS].view(-1), self._room_for_magnitudes(entries)
        if magnitudes is not None:
            words[_MAGNITUDES] = torch.tensor([magnitudes.data_ptr(), len(magnitudes)], device="cpu")
        if self.device.type == "cpu":
            return PreparedRows(by_part, matrix, matrix, magnitudes=magnitudes)
        data, elsewhere = self.data, None
        if len(data) <= 2 * _HEADER_ROWS:  # nothing was ever in it
            data = torch.zeros(2 * len(matrix), _COLUMNS, dtype=torch.int64, device=self.device)
        elif not self.fits(rows):
            elsewhere = self._room_for(rows)
            words[_ELSEWHERE] = torch.tensor([elsewhere.data_ptr(), len(elsewhere)], device="cpu")
        return PreparedRows(by_part, matrix.pin_memory(), data, elsewhere, magnitudes)

    def _room_for(self, rows: int) -> Tensor:
        """Room outside the table, twice as much as is needed."""
        if not self._outside or rows > len(self._outside[-1]):
            self._outside.append(torch.zeros(2 * rows, _COLUMNS, dtype=torch.int64, device=self.device))
        return self._outside[-1]

    def _room_for_magnitudes(self, entries: Sequence[SnapshotEntry]) -> Tensor | None:
        """Room for a row by every report index; what is known already comes along."""
        known = self.magnitudes
        needed = 1 + max((entry.report_index for entry in entries if entry.birth), default=-1)
        if not needed or (known is not None and needed <= len(known)):
            return known
        room = torch.zeros(2 * needed, len(MagnitudeField), dtype=torch.float64, device=self.device)
        if known is not None:
            room[: len(known)] = known
            self._outgrown.append(known)
        return room

    def forget_magnitudes(self) -> None:
        """The history of every tensor begins anew; on CUDA enqueued on the current stream."""
        if self.magnitudes is not None:
            self.magnitudes.zero_()

    def adopt(self, rows: PreparedRows) -> None:
        """The second half: ``rows`` take effect, in one statement on the CPU.

        On CUDA an interruption beside the upload leaves it unknown which rows the device reads. All that
        either points to is then kept until the next :meth:`adopt`, which settles it.
        """
        if self.device.type == "cpu":
            self._rows = rows
            return
        self._on_the_way = (rows, self._rows, self._on_the_way)
        uploaded = rows.matrix
        if rows.elsewhere is not None:
            rows.elsewhere[: len(uploaded) - _HEADER_ROWS].copy_(uploaded[_HEADER_ROWS:], non_blocking=True)
            uploaded = uploaded[:_HEADER_ROWS]
        rows.data[: len(uploaded)].copy_(uploaded, non_blocking=True)
        self._rows = rows
        self._on_the_way = ()

    def clear(self) -> None:
        """Take the rows away, on the device as well: whoever still reads the table finds none."""
        self.data[0, :2] = 0
        self._rows = PreparedRows((), self._rows.matrix, self.data, magnitudes=self.magnitudes)

    def _check_devices(self, entries: Sequence[SnapshotEntry]) -> None:
        device = self.data.device
        locked = set[int]()  # page-locked memory that was found to be so
        for number, entry in enumerate(entries):
            for name, tensor in (("live", entry.live), ("slots", entry.slots[0]), ("slots", entry.slots[1])):
                if tensor.device == device or tensor.numel() == 0:
                    continue
                if device.type == "cuda" and tensor.is_cpu:
                    memory = tensor.untyped_storage().data_ptr()
                    if memory in locked or tensor.is_pinned():
                        locked.add(memory)
                        continue
                raise ValueError(
                    f"entries[{number}].{name}: expected a tensor on {device}"
                    f"{' or in page-locked memory' if device.type == 'cuda' else ''}, got {tensor.device}"
                )

    def fits(self, rows: int) -> bool:
        """Whether so many rows fit without a new address."""
        return rows <= len(self.data) - _HEADER_ROWS

    def _rows_of(self, entry: SnapshotEntry) -> Iterator[list[int]]:
        check = _CHECK_KIND.get(entry.live.dtype, 0) if entry.report_index >= 0 else 0
        check = _ZEROED if entry.zeroed else check
        birth = entry.birth if check not in (0, _ZEROED) else 0
        first, second = (slot.data_ptr() for slot in entry.slots)
        for address, offset, nbytes in runs(entry.live):
            longest = nbytes if self.device.type == "cpu" else _BLOCK_BYTES
            for start in range(0, nbytes, longest):
                skip, length = offset + start, min(longest, nbytes - start)
                yield [address + start, first + skip, second + skip, length, check, entry.report_index, birth]
                birth = -abs(birth)

    @property
    def nbytes(self) -> int:
        """Bytes that one capture writes."""
        return sum(e.live.numel() * e.live.element_size() for e in self.entries)


def snapshot_capture_(
    state: Tensor,
    column: int,
    table: SnapshotTable,
    part: int,
    mailbox: Tensor | None = None,
    ticket: int = 0,
    aside: bool = False,
) -> None:
    """Copy a part of ``table`` to the slot governor ``column`` was ordered to fill; nothing without an order.

    Bytes are copied as they are; floating tensors with a report index are searched for non-finite values in
    the same pass, and for the largest magnitude if they have a birth. What is found and the completion are
    written to ``state``, where the next judgement reads them.

    Args:
        state: float64 ``(fields, n)`` of the governors; updated in place.
        column: whose order counts.
        table: what to copy.
        part: 0 or 1.
        mailbox: where the capture event goes once both parts are done.
        ticket: a number of the caller's for this launch, stored beside the capture; 0: none.
        aside: on CUDA, leave nearly all of the device to what runs beside the copy.

    Raises:
        ValueError: ``part`` or ``column`` is out of range.
    """
    if _backend.fused(state):
        torch.ops.tolaria.snapshot_capture_.default(state, column, table.data, part, mailbox, ticket, aside)
        return
    kept = [e for e in table.entries if e.part == part]
    reference.snapshot_capture_(
        state,
        column,
        [torch.zeros_like(e.live) if e.zeroed else e.live for e in kept],
        [e.slots for e in kept],
        [e.report_index if e.live.dtype in _CHECK_KIND else -1 for e in kept],
        part,
        mailbox,
        ticket,
        [e.birth if e.live.dtype in _CHECK_KIND and not e.zeroed else 0 for e in kept],
        table.magnitudes,
    )


def snapshot_restore_(
    state: Tensor, column: int, config: Tensor, table: SnapshotTable, mailbox: Tensor | None = None
) -> None:
    """Carry out a restore that was ordered for governor ``column``; nothing without an order.

    Every tensor of ``table`` gets the bytes of the last known good slot, in place.
    The governor's memory of that slot becomes the live one.

    Args:
        state: float64 ``(fields, n)`` of the governors; updated in place.
        column: whose order counts.
        config: float64 ``(CONFIG_FIELDS,)``.
        table: what to restore.
        mailbox: where the rollback event goes.
    """
    if _backend.fused(state):
        torch.ops.tolaria.snapshot_restore_.default(state, column, config, table.data, mailbox)
        return
    live, slots = [e.live for e in table.entries], [e.slots for e in table.entries]
    reference.snapshot_restore_(state, column, config, live, slots, mailbox)
