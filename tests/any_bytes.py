"""Bytes as states: values that nothing wrote, inside memory whose surroundings are watched."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tolaria import ops
from tolaria.ops import (
    ConfigField,
    Order,
    RecordField,
    SnapshotEntry,
    SnapshotTable,
    StateField,
    StatusField,
)
from tolaria.reference.magnitude import MagnitudeField

_ODD = [math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 0.5, 1.0, 1.5, 2.0, 3.0, 3.5, 4.0, 12.5, 20.0, 21.0]
_ODD += [-1.0, -1.5, -5000.0, 2.0**31, 2.0**53, 2.0**53 + 2, 2.0**63, -(2.0**63), 5e7, 1e300, -1e300, 1e19]
_CANARY = 0x5A5A_A5A5_1234_8765
_PAD = 64


def any_values(shape: tuple[int, ...], source: torch.Generator) -> Tensor:
    """float64 of any bits, odd values and small integers, mixed."""
    bits = torch.randint(-(2**63), 2**63 - 1, shape, generator=source).view(torch.float64)
    odd = torch.tensor(_ODD, dtype=torch.float64)[torch.randint(len(_ODD), shape, generator=source)]
    small = torch.randint(-1, 25, shape, generator=source).double()
    kinds = torch.rand(1, generator=source) + torch.rand(shape, generator=source)
    return torch.where(kinds % 1 < 0.3, bits, torch.where(kinds % 1 < 0.5, odd, small))


class Fenced:
    """A float64 matrix inside a larger buffer; what surrounds it must keep its bytes.

    Args:
        values: what it holds, ``(rows, columns)``.
        gap: foreign columns on either side of each row; 0 keeps the rows contiguous.
        device: where the buffer lies.
        pin_memory: whether it is page-locked.
    """

    def __init__(
        self, values: Tensor, *, gap: int = 0, device: str = "cpu", pin_memory: bool = False
    ) -> None:
        rows, columns = values.shape
        room = torch.full((rows + 2 * _PAD, columns + 2 * gap), _CANARY, pin_memory=pin_memory).to(device)
        self.room = room
        self.tensor = room.view(torch.float64)[_PAD : _PAD + rows, gap : gap + columns].copy_(values)
        self._mask = torch.ones(room.shape, dtype=torch.bool)
        self._mask[_PAD : _PAD + rows, gap : gap + columns] = False

    def is_intact(self) -> bool:
        """Whether nothing outside was written."""
        return bool((self.room.cpu()[self._mask] == _CANARY).all())

    @property
    def bits(self) -> Tensor:
        """The matrix as integers, on the CPU."""
        return self.tensor.cpu().contiguous().view(torch.int64)


def bits_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, on the CPU."""
    return tensor.detach().cpu().contiguous().view(torch.uint8)


class Scene:
    """A governor op's arguments, made of any bytes from a seed: the same ones on every device.

    Args:
        seed: what they are made from.
        device: where they lie.
        tame: leave the fields that decide whether anything happens to chance less often.
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self._source = source = torch.Generator().manual_seed(seed)
        self.device = device
        self.window = self._draw([1, 2, 5, 20])
        self.n = self._draw([1, 2, 3, 4, 5, 8, 17, 37])
        fields = len(ops.governor_state(1, window=self.window))
        values = any_values((fields, self.n), source)
        if self._draw([True, False]):  # a governor's own state, damaged here and there
            sound = ops.governor_state(self.n, window=self.window)
            damaged = torch.rand(values.shape, generator=source) < self._draw([0.01, 0.1, 0.3])
            values = torch.where(damaged, values, sound)
        self.state = Fenced(values, gap=self._draw([0, 1, 3]), device=device)
        records = self._draw([0, 1, 3, 8])
        width = len(StatusField) + records * len(RecordField)
        mailbox = any_values((self.n, width), source)
        self.mailbox = Fenced(mailbox, pin_memory=device != "cpu") if self._draw([1, 1, 1, 0]) else None
        config = any_values((len(ConfigField),), source)
        if self._draw([True, True, False]):
            config = self._sound_config()
        self.config = config.to(device)
        self.column = int(torch.randint(self.n, (), generator=source))
        self._losses = any_values((self.n,), source), any_values((self.n, 4), source)
        self._flags = torch.rand(4, self.n, generator=source) < 0.8
        self._kinds = [self._draw([0, 1, 2]) for _ in range(5)]
        self._memory = torch.randint(256, (6, 512), generator=source, dtype=torch.uint8)
        if self._draw([True, False]):  # values of ordinary size
            self._memory = torch.randn(6, 128, generator=source).view(torch.uint8)
        self._magnitudes = any_values((4, len(MagnitudeField)), source)
        self._magnitudes[:, MagnitudeField.now] = 0.0
        if self._draw([True, True, False]):  # known, and with enough of a history
            known = torch.tensor([0.5, 0.5, self._draw([1e-9, 1.0, 1e-4]), 3.0, 7.0, 1.0, 3.0, 3.0, 2.0, 1.0])
            known[5] = self._draw([0.0, 1.0, 2.0])
            self._magnitudes[:, : len(known)] = known
            self._magnitudes[:, MagnitudeField.birth] = torch.tensor([3.0, 4.0, 0.0, 0.0])

    def _draw(self, values: list[int] | list[float] | list[bool]) -> int:  # numbers of any kind
        return values[int(torch.randint(len(values), (), generator=self._source))]  # type: ignore[return-value]

    def _sound_config(self) -> Tensor:
        from tolaria.governor import GovernorConfig

        settings = GovernorConfig(
            window=max(2, self.window),
            min_history=2,
            drift_horizon=self._draw([0, 3]),
            rule=["all", "any"][self._draw([0, 1])],  # type: ignore[arg-type]
            snapshot_interval=2,
            probation=1,
            log_only=bool(self._draw([0, 0, 1])),
            skips_before_rollback=self._draw([0, 2]),
            suspicious_state=["off", "tell", "rollback"][self._draw([0, 1, 2])],  # type: ignore[arg-type]
        )
        return settings.to_tensor(2.3, "cpu", gradient_may_overflow=bool(self._draw([0, 1])))

    @property
    def letters(self) -> Tensor | None:
        """The mailbox, if there is one."""
        return None if self.mailbox is None else self.mailbox.tensor

    def step(self) -> None:
        """Judge losses of any kind."""
        losses, rows = self._losses
        norms = [None, losses.flip(0), rows][self._kinds[0]]
        flags = [None, ~self._flags[0], any_flags(self._flags[0])][self._kinds[1]]
        active = [None, self._flags[1], any_flags(self._flags[1])][self._kinds[2]]
        dtype = [torch.float64, torch.float32, torch.bfloat16][self._kinds[3]]
        loss = torch.where(self._flags[2], 1.0 + losses.nan_to_num(0, 0, 0).clamp(0, 1), losses).to(dtype)
        state_bad = [None, losses, any_flags(self._flags[3])][self._kinds[4]]
        given = [None if t is None else t.to(self.device) for t in (loss, flags, active, norms, state_bad)]
        ops.governor_step_(
            self.state.tensor, self.config, given[0], given[1], given[2], self.letters, given[3], given[4]
        )

    def order(self, order: Order) -> None:
        """Give an order to one of the governors."""
        ops.governor_order_(self.state.tensor, self.config, self.column, order, mailbox=self.letters)

    def snapshot(self) -> tuple[SnapshotTable, list[Fenced]]:
        """A table over fenced memory: live and two slots of two tensors."""
        fenced = [
            Fenced(row[: 512 if k < 3 else 8].view(torch.float64).view(-1, 1), device=self.device)
            for k, row in enumerate(self._memory)
        ]
        views = [f.tensor.view(torch.float32) for f in fenced]
        entries = [
            SnapshotEntry(
                views[3 * part], (views[3 * part + 1], views[3 * part + 2]), part, part, birth=3 + part
            )
            for part in (0, 1)
        ]
        table = SnapshotTable(entries, device=self.device)
        assert table.magnitudes is not None
        table.magnitudes.copy_(self._magnitudes.to(self.device))
        return table, fenced

    def capture(self, part: int) -> list[Fenced]:
        """Copy a part to the slot that the state orders, if any."""
        table, fenced = self.snapshot()
        ops.snapshot_capture_(self.state.tensor, self.column, table, part, self.letters)
        assert table.magnitudes is not None
        return [*fenced, Fenced(table.magnitudes.cpu())]

    def restore(self) -> list[Fenced]:
        """Restore from the slot that the state says, if it orders that."""
        table, fenced = self.snapshot()
        ops.snapshot_restore_(self.state.tensor, self.column, self.config, table, self.letters)
        return fenced


def any_flags(flags: Tensor) -> Tensor:
    """Bools of which the true ones are any byte but 0."""
    return (flags.to(torch.uint8) * 254).view(torch.bool)


CALLS: dict[str, Callable[[Scene], list[Fenced] | None]] = {
    "step": Scene.step,
    "rollback": lambda scene: scene.order(Order.ROLLBACK),
    "capture": lambda scene: scene.order(Order.CAPTURE),
    "promote": lambda scene: scene.order(Order.PROMOTE),
    "forget": lambda scene: scene.order(Order.FORGET),
    "hold": lambda scene: scene.order(Order.HOLD),
    "relearn": lambda scene: scene.order(Order.RELEARN),
    "snapshot_capture_0": lambda scene: scene.capture(0),
    "snapshot_capture_1": lambda scene: scene.capture(1),
    "snapshot_restore": Scene.restore,
}
"""Every governor op, by name."""


def outcome(scene: Scene, call: str) -> list[Tensor]:
    """Make a call; the bits of everything it may have written, after a look at what surrounds them."""
    touched = [scene.state, *([scene.mailbox] if scene.mailbox else []), *(CALLS[call](scene) or [])]
    if scene.device != "cpu":
        torch.cuda.synchronize()
    assert all(fenced.is_intact() for fenced in touched), f"{call}: wrote outside its row"
    return [fenced.bits for fenced in touched]


def orders_something(scene: Scene, call: str) -> bool:
    """Whether a snapshot op has an order to carry out; the other ops always have."""
    column = scene.state.tensor[:, scene.column]
    if call.startswith("snapshot_capture"):
        return bool(column[StateField.capture_order_0 + int(call[-1])] >= 0)
    return call != "snapshot_restore" or bool(column[StateField.restore_order] != 0)
