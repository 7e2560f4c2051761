"""The loss of a step that is made of micro-batches, added up where it is: the host waits for nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tolaria._arguments import as_number
from tolaria.snapshot import graphs

ADDED: Any = object()
"""Stands for no argument: the losses that were added."""


class LossMean:
    """The weighted mean of losses, in float64 on the device.

    Args:
        device: where they arrive.
    """

    def __init__(self, device: torch.device) -> None:
        self._total, self._weight, self._mean = torch.zeros(3, 1, dtype=torch.float64, device=device).unbind()
        self.count = 0
        """How many there are."""

    def add(self, loss: Tensor | float, weight: Tensor | float) -> None:
        """Count ``loss`` in; with a weight of 0 it is left out, whatever it is.

        Raises:
            TypeError: one is neither a number nor a tensor of numbers.
            ValueError: one has more than one element or is on another device; a weight that is a number is
                negative or not finite.
        """
        share, added = self._value("loss", loss), self._value("weight", weight)
        if isinstance(added, float) and not 0.0 <= added < math.inf:
            raise ValueError(f"weight: expected a finite number of at least 0, got {weight!r}")
        if graphs.is_recording(self._total.device):
            graphs.outlive(self._total, self._weight, self._mean)
        self.count += 1
        if isinstance(added, Tensor):  # selected, since 0 * NaN is NaN
            self._total.add_(torch.where(added == 0, 0.0, share * added))
        elif added != 0:
            self._total.add_(share * added)
        self._weight.add_(added)

    def _value(self, name: str, value: Tensor | float) -> Tensor | float:
        if not isinstance(value, Tensor):
            return as_number(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one value, got shape {tuple(value.shape)}")
        if value.is_complex() or (name == "loss" and not value.is_floating_point()):
            raise TypeError(f"{name}: expected a floating tensor, got dtype {value.dtype}")
        if value.device != self._total.device:
            raise ValueError(f"{name}: expected device {self._total.device}, got {value.device}")
        return value.detach().reshape(1).to(torch.float64)

    def instead_of(self, given: object) -> Tensor:
        """The mean of what was added, float64 ``(1,)``, NaN if all weights were 0; :meth:`clear` drops it.

        Raises:
            TypeError: nothing was added.
            ValueError: a loss, or None, is ``given`` besides.
        """
        if not self.count:
            raise TypeError(
                "loss: expected a loss, a verdict or None, got nothing; call add_loss before, or pass it"
            )
        if given is not ADDED:
            self.refuse_beside("None" if given is None else "a loss")
        return torch.div(self._total, self._weight, out=self._mean)

    def refuse_beside(self, given: str) -> None:
        """Something else is judged: nothing may have been added.

        Raises:
            ValueError: something was.
        """
        if self.count:
            raise ValueError(
                f"loss: expected nothing beside the {self.count} that add_loss was given, got {given}; call "
                "step() without a loss, which judges their mean"
            )

    def clear(self) -> None:
        """Begin anew."""
        if self.count:
            self.count = 0
            self._total.zero_()
            self._weight.zero_()
