"""What trainers wrap around optimizers and schedulers is seen through: hooks, state, rates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria import GovernorConfig, Snapshot, TolariaGovernor


def accelerated(model: nn.Module, optimizer: Any) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


def of_fabric(model: nn.Module, optimizer: Any) -> Any:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup(model, optimizer)[1]


def of_lightning(model: nn.Module, optimizer: Any) -> Any:
    core = pytest.importorskip("lightning.pytorch.core.optimizer")
    return core.LightningOptimizer(optimizer)


WRAPPERS = pytest.mark.parametrize("wrap", [accelerated, of_fabric, of_lightning])


def parts(wrap: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return model, optimizer, wrap(model, optimizer)


@WRAPPERS
def test_the_norm_is_taken_before_the_step_and_nothing_is_counted_twice(wrap: Any) -> None:
    model, optimizer, wrapped = parts(wrap)
    governor = TolariaGovernor(model, [wrapped, optimizer], config=GovernorConfig.balanced())
    for bad in (False, True):
        model(torch.ones(4, 3)).sum().backward()
        if bad:
            model.weight.grad[0, 0] = math.nan
        optimizer.step()
        optimizer.zero_grad()
        governor.step(1.0)
    assert governor.last_report is not None
    assert governor.last_report.reason.name == "GRADIENT_NORM"
    assert governor._engine.covered.optimizers == [optimizer]
    governor.add_optimizer(wrapped)
    assert governor._engine.covered.optimizers == [optimizer]
    governor.remove_optimizer(wrapped)
    assert governor._engine.covered.optimizers == []


@WRAPPERS
def test_a_guard_hears_of_the_inner_ones_steps(wrap: Any) -> None:
    model, optimizer, wrapped = parts(wrap)
    governor = tolaria.guard(model, wrapped)
    model(torch.ones(4, 3)).sum().backward()
    model.weight.grad[0, 0] = math.nan
    optimizer.step()
    assert governor.rollback_count == 1
    assert not optimizer.state


@WRAPPERS
def test_snapshots_by_hand_take_the_inner_state(wrap: Any) -> None:
    model, optimizer, wrapped = parts(wrap)
    snapshot = Snapshot(model, wrapped)
    snapshot.capture()
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    snapshot.restore()
    assert not optimizer.state


@pytest.mark.parametrize("lr_recovery_steps", [0, 3])
def test_lowered_rates_reach_an_accelerated_schedule(lr_recovery_steps: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, wrapped, scheduler = accelerator.prepare(model, optimizer, schedule)
    config = GovernorConfig(lr_factor=0.5, lr_recovery_steps=lr_recovery_steps)
    governor = TolariaGovernor(model, wrapped, schedulers=[scheduler], config=config)

    def step() -> None:
        model(torch.ones(4, 3)).sum().backward()
        wrapped.step()
        scheduler.step()
        wrapped.zero_grad()

    step()
    governor.step(1.0)
    governor.execute_rollback()
    assert wrapped.param_groups[0]["lr"] == 1.5e-3
    for _ in range(2):
        step()
        governor.step(1.0)
    assert wrapped.param_groups[0]["lr"] == 1.5e-3
    step()
    governor.step(1.0)
    assert wrapped.param_groups[0]["lr"] == (3e-3 if lr_recovery_steps else 1.5e-3)


def test_accumulation_of_accelerate_takes_the_norm_once() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(3, 2)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    governor = tolaria.guard(model, optimizer)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(4, 3)).sum())
            optimizer.step()
            optimizer.zero_grad()
    assert governor.step_count == 3
