"""Runs whose rates a rollback lowers for a time, under every kind of schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from tolaria.governor import GovernorConfig, TolariaGovernor

FACTOR = 0.3
"""Which no float holds: multiplied and divided, a rate is another."""

Make = Callable[[Optimizer], LRScheduler] | None

SCHEDULES: dict[str, Make] = {
    "none": None,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.97**n),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.7, total_steps=400),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=60, eta_min=0.011),
    "warm-restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=17, eta_min=0.003),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.973),
    "step": lambda o: lr_scheduler.StepLR(o, 7, 0.31),
    "swa": lambda o: SWALR(o, swa_lr=0.013, anneal_epochs=30),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.007)],
        milestones=[25],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([
        lr_scheduler.ConstantLR(o, 0.3, total_iters=14), lr_scheduler.ExponentialLR(o, 0.9)
    ]),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.3, step_size_up=7),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=50, power=1.7),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.93),
}  # fmt: skip


class Run:
    """A model, two groups of different rates, maybe a schedule."""

    def __init__(self, make: Make = None, *, is_tensor: bool = False) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 2)
        rates: list[Any] = [torch.tensor(0.3), torch.tensor(0.07)] if is_tensor else [0.3, 0.07]
        groups = zip(self.model.parameters(), rates, strict=True)
        self.optimizer = torch.optim.AdamW([{"params": [p], "lr": rate} for p, rate in groups], foreach=False)
        self.schedule = None if make is None else make(self.optimizer)

    def govern(self, steps: int = 12, **settings: Any) -> TolariaGovernor:
        config = {"lr_factor": FACTOR, "snapshot_interval": 5, "probation": 1, **settings}
        options = {"schedules": config.pop("schedules", "rewind")}
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            config=GovernorConfig(lr_recovery_steps=steps, **config),
            schedulers=[] if self.schedule is None else [self.schedule],
            **options,
        )
        return self.governor

    def train(self) -> None:
        self.optimizer.zero_grad()
        (self.model(torch.ones(1, 2)).sum() * 1e-3).backward()
        self.optimizer.step()

    def rates(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def settings(self) -> Any:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return copy.deepcopy((groups, None if self.schedule is None else self.schedule.state_dict()))

    def load(self, settings: Any) -> None:
        groups, schedule = copy.deepcopy(settings)
        for group, values in zip(self.optimizer.param_groups, groups, strict=True):
            for key, value in values.items():
                if isinstance(group[key], Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value
        if self.schedule is not None:
            self.schedule.load_state_dict(schedule)
