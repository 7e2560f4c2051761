"""A run with all kinds of state that can be poisoned: parameters, buffers, moments, an extra, a mask."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tolaria.governor import GovernorConfig, TolariaGovernor


class Average:
    """An average that is no module."""

    def __init__(self) -> None:
        self.values, self.refuses = torch.ones(3), False

    def state_dict(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if self.refuses:
            raise OSError("not today")
        self.values = state["values"].clone()


class Run:
    def __init__(self, *, steps: int = 8, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.average = Average()
        config = GovernorConfig(**{"snapshot_interval": 4, "probation": 1, **settings})
        self.governor = TolariaGovernor(
            self.model, self.optimizer, config=config, extras={"average": self.average}
        )
        for _ in range(steps):
            self.step()
        self.governor.poll()

    def step(self) -> None:
        loss = self.model(torch.randn(8, 3)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.governor.step(loss)

    def poison(self, place: str) -> None:
        last = self.model[2]
        with torch.no_grad():
            if place == "2.weight":
                last.weight[0, 0] = math.nan
            elif place == "1.running_var":
                self.model[1].running_var[1] = math.inf
            elif place == "average":
                self.average.values = torch.tensor([1.0, math.nan])
            else:
                self.optimizer.state[last.weight]["exp_avg_sq"][0, 0] = math.nan

    def is_finite(self) -> bool:
        state = [*self.model.parameters(), self.model[1].running_var, self.average.values]
        state += [s["exp_avg_sq"] for s in self.optimizer.state.values()]
        return all(bool(t.isfinite().all()) for t in state)
