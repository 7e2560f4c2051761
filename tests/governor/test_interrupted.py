"""Ctrl-C at any line of a call: the state is that of before or of after, or the next call completes it."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import nn

from tests.interrupting import CALLS, Counter, Interruption
from tolaria.governor import GovernorConfig, TolariaGovernor


class Run:
    """A state that says everywhere which one it is."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.9)
        for p in self.model.parameters():
            self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda n: 1.0)
        self.extra = Counter()
        self.mark(1.0)
        config = GovernorConfig(
            snapshot_interval=1000, probation=2, max_restores_of_one_capture=1000, **settings
        )
        self.governor = TolariaGovernor(
            self.model,
            self.optimizer,
            schedulers=[self.scheduler],
            extras={"extra": self.extra},
            config=config,
        )
        self.mark(2.0)

    def mark(self, value: float) -> None:
        with torch.no_grad():
            for tensor in (*self.model.parameters(), self.model[1].running_mean):
                tensor.fill_(value)
            for state in self.optimizer.state.values():
                state["momentum_buffer"].fill_(value)
        self.optimizer.param_groups[0]["lr"] = value
        self.scheduler.last_epoch = int(value)
        self.extra.n = value

    def marks(self) -> set[float]:
        """What the parts say; one number if they are of one state."""
        moments = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        tensors = [*self.model.parameters(), self.model[1].running_mean, *moments]
        found = {value for tensor in tensors for value in tensor.detach().flatten().tolist()}
        rate = self.optimizer.param_groups[0]["lr"]
        return found | {rate, float(self.scheduler.last_epoch), self.extra.n}


EVERY = int(os.environ.get("TOLARIA_INTERRUPT_EVERY", "7"))
"""One line of so many is tried; 1: all of them, which takes minutes."""


@pytest.mark.parametrize("name", CALLS)
def test_a_call_interrupted_at_any_line(name: str) -> None:
    run, whole = Run(), Interruption()
    call = CALLS[name](run.governor)
    with whole.on():
        call()
    assert len(whole.places) > 50
    torn = []
    for at in range(0, len(whole.places), EVERY):
        run, interruption = Run(), Interruption(at)
        call = CALLS[name](run.governor)
        if not interruption.stops(call):
            continue
        at_once = run.marks()  # whoever catches Ctrl-C saves this
        run.governor.step(1.0)
        after = run.marks()
        for _ in range(4):
            run.governor.step(1.0)
        run.mark(3.0)
        with torch.no_grad():
            run.model[0].weight.fill_(math.nan)
        run.governor.step(math.nan)
        at_last = run.marks()
        if any(marks not in ({1.0}, {2.0}) for marks in (at_once, after, at_last)):
            torn.append(f"{whole.named(at)}: {at_once}, {after}, then {at_last}")
    assert torn == [], "\n".join(torn)


LOWERING = ("policy.py", "following.py", "lowered_rates.py", "own_rates.py", "transfer.py", "host_state.py")


@pytest.mark.parametrize("name", ["step_that_rolls_back", "execute_rollback"])
def test_the_rates_are_lowered_once_for_a_rollback_whatever_interrupts_it(name: str) -> None:
    detail = {"apply", "hear", "_note", "follow", "_end_step", "caught_up", "restored", "for_good"}
    run, whole = Run(lr_factor=0.5), Interruption(within=LOWERING, in_detail=detail)
    call = CALLS[name](run.governor)
    with whole.on():
        call()
    assert run.marks() == {1.0, 0.5}
    torn = []
    for at in range(0, len(whole.places), EVERY):
        run = Run(lr_factor=0.5)
        interruption = Interruption(at, within=LOWERING, in_detail=detail)
        call = CALLS[name](run.governor)
        if not interruption.stops(call):
            continue
        at_once = rates(run)
        run.governor.step(1.0)
        after = rates(run)
        if after not in ({0.5}, {2.0}) or at_once not in ({0.5}, {2.0}, {1.0}):
            torn.append(f"{whole.named(at)}: {at_once}, {after}")
    assert torn == [], "\n".join(torn)


def rates(run: Run) -> set[float]:
    """The live rate, as a multiple of what belongs to the state that the parameters are of."""
    (value,) = {v for p in run.model.parameters() for v in p.detach().flatten().tolist()}
    base = run.scheduler.base_lrs[0] if value == 1.0 else run.optimizer.param_groups[0]["lr"]
    return {run.optimizer.param_groups[0]["lr"], base}
