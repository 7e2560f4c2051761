"""One governor in the judge's memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria import ops
from tolaria.governor.config import GovernorConfig
from tolaria.ops import Order, PanicReason, StateField, StatusField
from tolaria.snapshot.memory import allocate
from tolaria.telemetry.mailbox import MailboxReader


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
