"""A run whose losses are all healthy while somebody changes its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.governor import (
    GovernorConfig,
    GovernorEvent,
    PanicReason,
    PromotionEvent,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)
from tolaria.ops import StateField

INTERVAL = 4
SUSPICIOUS = PanicReason.SUSPICIOUS_STATE


class Net(nn.Module):
    """Two parameters and two buffers that nobody trains."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("mean", torch.full((3,), 0.1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.mean: Tensor


class Run:
    """Steps whose losses are all healthy; ``events`` holds what was told, by step."""

    def __init__(
        self, model: nn.Module | None = None, device: str = "cpu", steps: int = 4 * INTERVAL + 1, **given: Any
    ) -> None:
        self.model: Any = (model or Net()).to(device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.0)
        self.options = {name: given.pop(name) for name in ("cover",) if name in given}
        self.config = GovernorConfig(**{"snapshot_interval": INTERVAL, "probation": 1, **given})
        self.governor = self.attach()
        self.events: list[GovernorEvent] = []
        self.train(steps)

    def attach(self) -> TolariaGovernor:
        return TolariaGovernor(self.model, self.optimizer, config=self.config, **self.options)

    def train(self, steps: int, change: Callable[[], object] = lambda: None) -> list[GovernorEvent]:
        """So many steps, ``change`` before each; what was told."""
        told: list[GovernorEvent] = []
        with torch.no_grad():
            for _ in range(steps):
                change()
                self.governor.step(1.0)
                told += self.governor.synchronize()
        self.events += told
        return told

    def to_capture(self) -> None:
        """Up to the step before the next capture."""
        with torch.no_grad():
            while (self.governor.step_count - self.due_from) < INTERVAL - 1:
                self.train(1)

    @property
    def due_from(self) -> int:
        return int(self.governor._attached.row.state[StateField.due_from])


def suspicions(events: list[GovernorEvent]) -> list[tuple[str | None, bool]]:
    return [
        (e.tensor_name, e.rollback) for e in events if isinstance(e, VerdictEvent) and e.reason is SUSPICIOUS
    ]


def promotions(events: list[GovernorEvent]) -> list[int]:
    return [e.capture_step for e in events if isinstance(e, PromotionEvent)]


def rollbacks(events: list[GovernorEvent]) -> list[tuple[PanicReason, str | None, int]]:
    found = [e.report for e in events if isinstance(e, RollbackEvent)]
    return [(r.reason, r.tensor_name, r.restored_step) for r in found]
