"""A step whose loss nobody knows: its gradients and the state are judged, and the window of losses stays.

The judge knows no step without a loss. It is given one that is below everything it compares a loss with, and
what it then notes of it is taken back, on the device: among the losses, and in the slot of a capture that it
has just ordered, which holds a copy of them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tolaria.governor.row import Row
from tolaria.ops import MemoryField, StateField, memory_row
from tolaria.snapshot import graphs
from tolaria.telemetry.verdict import NO_LOSS

_OF_THE_STEP = {MemoryField.consecutive, MemoryField.skips, MemoryField.gradient_size}
_LIFETIME = range(StateField.life_count, StateField.life_max + 1)


class WithoutLoss:
    """Judges steps without a loss for one governor.

    Args:
        row: the governor, alone in its memory.
    """

    def __init__(self, row: Row) -> None:
        self._state, window, device = row.state, row.config.window, row.state.device
        fields = [f for f in MemoryField if f not in _OF_THE_STEP]
        losses = range(len(MemoryField), len(MemoryField) + window)
        of_losses = [memory_row(0, window, f) for f in (*fields, *losses)]
        slot = memory_row(1, window, 0) - memory_row(0, window, 0)
        self._live = torch.tensor([*_LIFETIME, *of_losses], device="cpu").to(device)
        self._of_losses = self._live[len(_LIFETIME) :]
        self._slots = [self._of_losses + slot, self._of_losses + 2 * slot]
        self._before = self._state.index_select(0, self._live)
        self.loss: Tensor = torch.full((1,), NO_LOSS, dtype=torch.float64, device="cpu").to(device)
        """What the judge is given."""

    def begin(self) -> None:
        """A step is about to be judged."""
        if graphs.is_recording(self._state.device):
            graphs.outlive(self._live, self._before, self.loss, *self._slots)
        torch.index_select(self._state, 0, self._live, out=self._before)

    def end(self) -> None:
        """It has been judged: take the loss back."""
        state, before = self._state, self._before
        state.index_copy_(0, self._live, before)
        state[StateField.loss] = math.nan
        for number, rows in enumerate(self._slots):
            is_ordered = state[StateField.capture_order_0] == number
            losses = before[len(_LIFETIME) :]
            state.index_copy_(0, rows, torch.where(is_ordered, losses, state.index_select(0, rows)))
