"""One governor in the judge's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.config import GovernorConfig
from tolaria.ops import MemoryField, Order, PanicReason, StateField, StatusField, memory_row
from tolaria.ops.governor import held_back, suspicious_candidates
from tolaria.snapshot.memory import allocate
from tolaria.telemetry.mailbox import MailboxReader
from tolaria.telemetry.verdict import Pending

_VERDICT_FIELDS = StateField.reward + 1


@dataclass(slots=True)
class Row:
    """Where the judge keeps what it knows of one governor, and where it writes its orders and its news.

    The rows of a bank share all but the reader.
    """

    column: int
    """Which governor of ``state`` it is."""
    state: Tensor
    """float64 ``(fields, n)``."""
    settings: Tensor
    """What the judge reads of ``config``."""
    mailbox: Tensor
    """Where the ops write events, ``(n, words)``."""
    reader: MailboxReader
    """Reads this row of it."""
    config: GovernorConfig

    def status(self, word: StatusField) -> int:
        """One status word, as far as it has arrived; never waits."""
        return self.reader.status(word)

    def order(self, order: Order, reason: PanicReason = PanicReason.MANUAL, tensor: int = -1) -> None:
        """Give an order from outside the rule."""
        ops.governor_order_(self.state, self.settings, self.column, order, reason, tensor, self.mailbox)

    def verdict_fields(self) -> Tensor:
        """A copy of what the last judgement said, on the device."""
        return self.state[:_VERDICT_FIELDS, self.column].clone()

    def is_restore_ordered(self) -> bool:
        """Whether a rollback was called for and not carried out yet; waits for the device."""
        return bool(self.state[StateField.restore_order, self.column] != 0)  # sync: asked for by name

    def candidate_step(self) -> int | None:
        """Step of the capture that is on probation, or None; waits for a device."""
        candidate = int(self.state[StateField.candidate, self.column])  # sync: asked for by name
        if candidate < 0:
            return None
        return int(self.state[StateField.slot_step_0 + candidate, self.column])  # sync: likewise

    def pending(self, validations: int) -> Pending:
        """What is being counted; waits for the device.

        Args:
            validations: bad ones in a row.
        """
        values = self.state[:, self.column].tolist()  # sync: asked for by name
        window = self.config.window

        def live(field: MemoryField) -> float:
            return float(values[memory_row(0, window, field)])

        on_probation = values[StateField.candidate] >= 0
        return Pending(
            anomalies=int(live(MemoryField.consecutive)),
            lobotomies=int(live(MemoryField.lobotomy_pending)),
            collapse=live(MemoryField.collapse),
            shift=live(MemoryField.shift_sum),
            validations=validations,
            skips=int(live(MemoryField.skips)),
            probation=int(values[StateField.candidate_healthy]) if on_probation else None,
            rollback=values[StateField.restore_order] != 0,
        )

    def is_calm(self) -> bool:
        """Whether the last verdict was healthy and nothing speaks against the state; waits for the device."""
        pending, state = self.pending(0), self.state[:, self.column : self.column + 1]
        counted = pending.anomalies or pending.lobotomies or pending.skips or pending.rollback
        if counted or int(state[StateField.reason]) != PanicReason.HEALTHY:  # sync: asked for by name
            return False
        against = held_back(state, self.settings)
        against |= (state[StateField.candidate] >= 0) & (state[StateField.candidate_bad] >= 0)
        if self.config.suspicious_state != "off":
            undoes = self.config.suspicious_state == "rollback"
            against |= suspicious_candidates(state, undoes=undoes, interval=self.config.snapshot_interval)
        return not bool(against)  # sync: likewise

    def hold(self, *, is_held: bool) -> None:
        """Whether captures and promotions wait for a good validation; waits for the device."""
        live, *slots = (memory_row(which, self.config.window, MemoryField.held) for which in range(3))
        if bool(self.state[live, self.column]) == is_held:  # sync: between two steps
            return
        self.order(Order.HOLD if is_held else Order.RELEASE)
        if not is_held:
            for slot in slots:  # a capture that was made by hand meanwhile need not wait any more either
                self.state[slot, self.column] = 0.0

    def state_with_order(self) -> Tensor:
        """A copy of the judge's state that orders a restore, whose bookkeeping is then thrown away."""
        state = self.state.clone()
        state[StateField.restore_order, self.column] = 1.0
        return state

    def renew(self, config: GovernorConfig) -> None:
        """Go on under other settings, whose tensor has changed in place."""
        self.config = config
        self.reader.set_reward(-config.death_penalty)


def make_rows(
    n: int,
    config: GovernorConfig,
    settings: Tensor,
    device: torch.device | str,
    *,
    records: int,
    is_attached: bool = True,
) -> list[Row]:
    """Memory for ``n`` governors.

    Args:
        n: how many.
        config: the settings of all.
        settings: the same as a tensor on ``device``.
        device: where losses arrive.
        records: events that a row of the mailbox can hold until they are read.
        is_attached: whether they have slots; without, a rollback forgets the losses and restores nothing.
    """
    state = ops.governor_state(n, window=config.window, attached=is_attached, device=device)
    mailbox = _make_mailbox(n, records, state.device)
    boxes = mailbox.numpy()
    readers = [MailboxReader(boxes[i], i, -config.death_penalty) for i in range(n)]
    return [Row(i, state, settings, mailbox, reader, config) for i, reader in enumerate(readers)]


def _make_mailbox(n: int, records: int, device: torch.device) -> Tensor:
    """A mailbox from which ``records`` events can be read; page-locked for CUDA, whose device writes it."""
    empty = ops.governor_mailbox(n, records=records + 1)  # one may be half written
    if device.type != "cuda":
        return empty
    return allocate(empty.numel() * 8, device).view(torch.float64).view(empty.shape).copy_(empty)
