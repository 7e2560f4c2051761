"""Alpha schedules: how fast a seed is blended in. The value lives on the device and is advanced there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor

ScheduleKind = Literal["linear", "cosine", "sigmoid"]

MOST_STEPS = 1_000_000
"""Steps that a ramp may have: its values are a table on the device."""
_SIGMOID_SPAN = 6.0  # the sigmoid is cut at +-6 and rescaled, so that its ends are exact


def alpha_fraction(kind: ScheduleKind, fraction: float) -> float:
    """How much of the way has been gone at ``fraction`` (0 to 1) of the steps; exact at both ends."""
    if fraction <= 0.0:
        return 0.0
    if fraction >= 1.0:
        return 1.0
    if kind == "linear":
        return fraction
    if kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * fraction))
    low = 1.0 / (1.0 + math.exp(_SIGMOID_SPAN))
    value = 1.0 / (1.0 + math.exp(_SIGMOID_SPAN * (1.0 - 2.0 * fraction)))
    return min(1.0, max(0.0, (value - low) / (1.0 - 2.0 * low)))  # rounding may pass the ends


class AlphaSchedule:
    """Moves an alpha tensor from ``start`` to ``end`` in ``steps`` calls of :meth:`step`.

    The position is a tensor beside alpha and the values are a table on its device: :meth:`step` enqueues
    three small kernels, never waits for the device and may be recorded in a CUDA graph, whose every replay
    then takes one step.

    Args:
        alpha: 0-dim floating tensor to write, in place; set to ``start`` at once.
        steps: number of steps from start to end, 1 to 1,000,000.
        kind: ``"linear"``, ``"cosine"`` or ``"sigmoid"``.
        start: value at position 0, in [0, 1].
        end: value from position ``steps`` on, in [0, 1].
        position: 0-dim int64 tensor on alpha's device to keep the position in; a new one by default.
        limit: 0-dim tensor; alpha is never written above it. A governor that drops a seed zeroes it on the
            device, and alpha then stays at zero although the host goes on stepping for a while.

    Raises:
        ValueError: a bad kind, steps, start, end or alpha shape.  TypeError: ``alpha`` is not a floating
            tensor.
    """

    def __init__(
        self,
        alpha: Tensor,
        steps: int,
        kind: ScheduleKind = "linear",
        *,
        start: float = 0.0,
        end: float = 1.0,
        position: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> None:
        _check(alpha, steps, kind, start, end)
        self.alpha, self.steps, self.kind, self.start, self.end = (
            alpha,
            int(steps),
            kind,
            float(start),
            float(end),
        )
        self._limit = limit
        self._position = (
            position if position is not None else torch.zeros((), dtype=torch.int64, device=alpha.device)
        )
        values = [self.value_at(i) for i in range(self.steps + 1)]
        self._table = torch.tensor(values, dtype=alpha.dtype, device=alpha.device)
        self.reset()

    def value_at(self, position: int) -> float:
        """The scheduled value at ``position``, computed on the host."""
        moved = alpha_fraction(self.kind, position / self.steps)
        return self.end if moved >= 1.0 else self.start + (self.end - self.start) * moved

    def step(self) -> None:
        """Advance by one step, on the device; at the end alpha stays at ``end``."""
        self._position.add_(1).clamp_(0, self.steps)
        self._write()

    def reset(self) -> None:
        """Back to ``start``."""
        self._position.zero_()
        self._write()

    def _write(self) -> None:
        with torch.no_grad():
            value = self._table.index_select(0, self._position.view(1)).view(())
            if self._limit is not None:
                value = torch.minimum(value, self._limit)
            self.alpha.copy_(value)

    def rebind(self, alpha: Tensor, position: Tensor, limit: Tensor) -> None:
        """Go on at the same place over other tensors (after a module moved to another device)."""
        self.alpha, self._position, self._limit = alpha, position, limit
        self._table = self._table.to(device=alpha.device)

    @property
    def position(self) -> int:
        """Steps taken so far."""
        return int(self._position.item())  # sync: a person or a checkpoint asks

    @property
    def done(self) -> bool:
        """Whether alpha has arrived."""
        return self.position >= self.steps

    def state_dict(self, *, on_device: bool = False) -> dict[str, object]:
        """Settings and position; everything needed to go on.

        Args:
            on_device: leave the position the int64 tensor that it is, which nobody waits for.
        """
        return {
            "kind": self.kind,
            "steps": self.steps,
            "start": self.start,
            "end": self.end,
            "position": self._position if on_device else self.position,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from ``state`` (of a schedule with the same settings).

        Raises:
            ValueError: the settings differ, or the position lies outside the schedule; it names the key.
            TypeError: ``state`` is no mapping.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"AlphaSchedule.load_state_dict: expected a dict, got {type(state).__name__}")
        mine = self.state_dict()
        if set(state) != set(mine):
            raise ValueError(
                f"AlphaSchedule.load_state_dict: expected the keys {sorted(mine)}, got {list(state)}"
            )
        for key, value in state.items():
            fits = type(value) is type(mine[key])
            if key == "position":
                wanted = f"an integer from 0 to {self.steps}"
                fits = fits and isinstance(value, int) and 0 <= value <= self.steps
            else:
                wanted = f"{mine[key]!r} like this schedule"
                fits = fits and value == mine[key]
            if not fits:
                raise ValueError(f"AlphaSchedule.load_state_dict: {key}: expected {wanted}, got {value!r}")
        self._position.fill_(cast(int, state["position"]))
        self._write()

    def __repr__(self) -> str:
        return f"AlphaSchedule({self.kind!r}, steps={self.steps}, {self.start} -> {self.end})"


def _check(alpha: Tensor, steps: int, kind: str, start: float, end: float) -> None:
    if not isinstance(alpha, Tensor) or not alpha.is_floating_point():
        got = alpha.dtype if isinstance(alpha, Tensor) else type(alpha).__name__
        raise TypeError(f"AlphaSchedule: alpha: expected a floating point tensor, got {got}")
    if alpha.dim() != 0:
        raise ValueError(f"AlphaSchedule: alpha: expected a 0-dim tensor, got shape {tuple(alpha.shape)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"AlphaSchedule: steps: expected an integer >= 1, got {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"AlphaSchedule: steps: expected at most {MOST_STEPS}, got {steps}")
    if kind not in get_args(ScheduleKind):
        raise ValueError(f"AlphaSchedule: kind: expected one of {get_args(ScheduleKind)}, got {kind!r}")
    for name, value in (("start", start), ("end", end)):
        if not (isinstance(value, (int, float)) and 0.0 <= value <= 1.0):  # also refuses NaN
            raise ValueError(f"AlphaSchedule: {name}: expected a number in [0, 1], got {value!r}")
