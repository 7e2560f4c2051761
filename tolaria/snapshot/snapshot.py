"""Snapshots by hand: a state captured and put back without a governor, by the same code and at its speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from tolaria import ops
from tolaria._arguments import as_flag, check_choice
from tolaria.errors import SnapshotError
from tolaria.ops import ConfigField, StateField
from tolaria.snapshot import graphs
from tolaria.snapshot.base import SnapshotBase
from tolaria.snapshot.covered import CoveredState
from tolaria.snapshot.inference import outside_inference
from tolaria.snapshot.parts import Cover, Parts, ScheduleChoice
from tolaria.snapshot.protocols import Stateful
from tolaria.snapshot.saved import SavedState
from tolaria.snapshot.streams import InOrder
from tolaria.snapshot.transfer import Transfer
from tolaria.snapshot.watch import BeforeSteps

Storage = Literal["pinned", "device"]
"""Where copies of a CUDA model lie: page-locked host memory, or the device's own."""


class Snapshot:
    """A copy of a training state that can be put back any number of times.

    For line searches, what-if steps, lookahead, population-based training, probes of hyper-parameters::

        snapshot = Snapshot(model, optimizer)
        snapshot.capture()
        ...                    # train, try, break
        snapshot.restore()     # parameters, buffers, optimizer, schedules: in place, bit for bit

    Memory is taken once, when it is made and where the model grows. A capture and a restore work on the
    current stream and never wait for a CUDA device. Gradients are no part of it.

    Args:
        model: parameters and buffers to cover; all on one device. Seeds come back at their stage.
        optimizers: none, one or several; all their state and hyper-parameters are covered.
        schedulers, scaler, extras, generators, schedules, cover: as for :class:`TolariaGovernor`.
        restore_rng: whether the random generators go back, too: torch's of the CPU and of the model's device,
            ``random``, NumPy's, and ``generators``. A restore then draws what followed the capture.
        slots: 1, or 2 for twice the memory: a capture that is interrupted then leaves the one before whole.
        storage: where copies of a CUDA model lie, ``"pinned"`` (host memory) or ``"device"``.

    Raises:
        ValueError, TypeError: an argument is out of range, or of the wrong type.
        SnapshotError: a tensor cannot be copied byte by byte, or there is no memory for the copies.
        RuntimeError: sharded parameters, or several devices.
    """

    @outside_inference
    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        *,
        schedulers: Sequence[Stateful] = (),
        scaler: torch.amp.GradScaler | None = None,
        extras: Mapping[str, Stateful] | None = None,
        generators: Sequence[torch.Generator] = (),
        schedules: ScheduleChoice = "rewind",
        cover: Cover = "all",
        restore_rng: bool = False,
        slots: int = 1,
        storage: Storage = "pinned",
    ) -> None:
        parts = Parts.checked(
            model,
            optimizers,
            schedulers=schedulers,
            scaler=scaler,
            extras=extras,
            generators=generators,
            schedules=schedules,
            cover=cover,
        )
        check_choice("slots", slots, (1, 2))
        check_choice("storage", storage, get_args(Storage))
        covered = CoveredState(parts, restore_rng=as_flag("restore_rng", restore_rng), by_hand=True)
        self._base = base = SnapshotBase(covered, storage, copies=slots)
        self._slots = slots
        self._transfer = Transfer(base)
        self._orders = _Orders(covered.device)
        self._in_order = InOrder(covered.device, base.slots, self._orders)
        self._last: int | None = None
        base.sync_structure()
        # What is not finite from the start is no finding later.
        base.bad_host_part(base.host_parts(), waits=True)
        self._names: tuple[str, ...] = ()
        self._steps = BeforeSteps(self._notice_growth)
        for optimizer in covered.optimizers:
            self._steps.hook(optimizer)

    @outside_inference
    def capture(self) -> None:
        """Copy the state as it is now; with one slot the capture before is gone from here on.

        Raises:
            SnapshotError: the state cannot be captured; the capture before is as it was.
            TolariaError: a CUDA graph is being recorded.
        """
        base = self._base
        self._begin("capture")
        if self._transfer.is_unfinished:
            self._restore()
        if base.may_have_moved():
            self._in_order.before_new_table()
            base.sync_structure()
        host = base.host_parts()
        slot = 0 if self._last is None else (self._last + 1) % self._slots
        if slot == self._last:
            self._last = None
        try:
            self._transfer.capture(slot, host, lambda: self._orders.capture(slot, base.slots.table))
        finally:
            self._in_order.done()
        self._last, self._names = slot, base.slots.names

    @outside_inference
    def restore(self) -> None:
        """Put the last capture back, in place: what came into being since goes, or gets its birth value.

        Raises:
            SnapshotError: nothing was captured yet, or a scheduler or an extra refused its state; everything
                else is back then.
            TolariaError: a CUDA graph is being recorded.
        """
        self._begin("restore")
        self._restore()

    def _restore(self) -> None:
        slot = self._whole_slot()
        if self._base.may_have_moved():
            self._in_order.before_new_table()
        put_back = self._orders.restore
        try:
            # Again: whoever restores twice wants the same random numbers twice.
            self._transfer.restore(slot, lambda: put_back(slot, self._base.slots.table), again=True)
        finally:
            self._in_order.done()

    def _begin(self, call: str) -> None:
        graphs.refuse_recording(self._base.covered.device, f"Snapshot.{call}")
        self._in_order.begin()

    def _whole_slot(self) -> int:
        if self._last is None:
            raise SnapshotError(
                "Snapshot: expected a capture to go back to; there was none yet, or the last one was "
                "interrupted and slots=1 keeps no other"
            )
        return self._last

    def _notice_growth(self) -> None:
        """Before an optimizer steps: new parameters get their places while they hold their birth values."""
        base = self._base
        if not graphs.is_recording(base.covered.device) and base.covered.structure() != base.structure:
            self._in_order.begin()
            self._in_order.before_new_table()
            base.sync_structure(leave_out=True)
            self._in_order.done()

    # -- what it holds ---------------------------------------------------------------------------------------

    @property
    def nonfinite(self) -> str | None:
        """The name of the first tensor that held NaN or infinity at the last capture; None: all were finite.

        Buffers that were not finite when the snapshot was made (masks) do not count. On CUDA it waits.

        Raises:
            SnapshotError: nothing was captured yet.
        """
        slot = self._whole_slot()
        bad = self._orders.first_bad(slot)
        if bad is not None:
            return self._names[bad]
        return self._base.bad_host_part(self._transfer.host(slot), waits=True)

    @property
    def is_finite(self) -> bool:
        """Whether the last capture held finite values alone; as :attr:`nonfinite`."""
        return self.nonfinite is None

    @outside_inference
    def state_dict(self) -> dict[str, Any]:
        """The last capture as ordinary state dicts, with copies of the tensors on the CPU.

        On CUDA it waits for the device.

        Returns:
            ``model``, ``optimizers`` (a list), ``schedulers`` (a list), ``scaler`` (or None), ``extras`` (by
            name): each for ``load_state_dict`` of its own; ``attributes``: plain data among the attributes of
            module extras, by path; ``rng``: states of the random generators.

        Raises:
            SnapshotError: nothing was captured yet, or an optimizer cannot say the state that it had.
        """
        slot = self._whole_slot()
        self._in_order.wait()
        return SavedState(self._base, self._transfer.host(slot), slot).dicts()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the copies take, in all slots."""
        return self._base.slots.nbytes

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Snapshot: it belongs to one model and cannot be copied or pickled; make a new one for the copy, "
            "or save state_dict()"
        )


class _Orders:
    """The memory through which the snapshot ops are told what to do, and say what they found.

    They read a judge's orders; here these are written beforehand, one column for each thing to do.
    """

    def __init__(self, device: torch.device) -> None:
        blank = ops.governor_state(1, window=2, device="cpu")
        settings = torch.zeros(len(ConfigField), dtype=torch.float64, device="cpu")
        self.settings = settings.to(device)  # what a rollback costs; nobody reads that here
        self._captures, self._restores = [], []
        for slot in (0.0, 1.0):
            capture, restore = blank.clone(), blank.clone()
            for field in (StateField.capture_order_0, StateField.capture_order_1, StateField.candidate):
                capture[field] = slot
            restore[StateField.last_good], restore[StateField.restore_order] = slot, 1.0
            self._captures.append(capture.to(device))
            self._restores.append(restore.to(device))
        self._found = [column.clone() for column in self._captures]
        self._restoring = blank.to(device)

    def capture(self, slot: int, table: ops.SnapshotTable) -> None:
        """Copy what ``table`` names to ``slot``."""
        state = self._found[slot].copy_(self._captures[slot])
        for part in (0, 1):
            ops.snapshot_capture_(state, 0, table, part)

    def restore(self, slot: int, table: ops.SnapshotTable) -> None:
        """Copy it back."""
        state = self._restoring.copy_(self._restores[slot])
        ops.snapshot_restore_(state, 0, self.settings, table)

    def first_bad(self, slot: int) -> int | None:
        """The number of the first tensor that was not finite; waits for the device."""
        bad = int(self._found[slot][StateField.candidate_bad])  # sync: asked for by name
        return bad if bad >= 0 else None
