"""A warm restart is told from a burst of the learning rate."""

from __future__ import annotations

import pytest
import torch

from tolaria.governor.rates import RateWatch


def told(rates: list[float], *, back_at: int | None = None) -> list[int]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rates[0])
    watch, found = RateWatch(), []
    for step, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        if watch.is_restart([optimizer], rollbacks=int(back_at is not None and step >= back_at)):
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([0.1, 0.05, 0.01, 0.1, 0.05], [3]),
        ([0.1, 0.1, 1.0, 1.0], []),  # a burst: no such rate before
        ([0.1, 0.1, 1.0, 0.1, 1.0], [4]),
        ([0.01, 0.012, 0.014, 0.0168], []),  # a warm-up
        ([0.1, 0.05, 0.06, 0.07], []),
        ([0.0, 0.1, 0.0, 0.1], [3]),
    ],
)
def test_a_return_to_a_known_rate_is_a_restart(rates: list[float], found: list[int]) -> None:
    assert told(rates) == found


def test_rates_that_a_rollback_puts_back_are_no_restart() -> None:
    assert told([0.1, 0.05, 0.1], back_at=2) == []
    assert told([0.1, 0.05, 0.1, 0.02, 0.1], back_at=2) == [4]


def test_a_cosine_with_restarts_is_followed() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=20, T_mult=2, eta_min=1e-4)
    watch, found = RateWatch(), []
    for step in range(150):
        if watch.is_restart([optimizer]):
            found.append(step)
        optimizer.step()
        schedule.step()
    assert found == [20, 60, 140]


def test_groups_that_come_are_no_restart_and_tensors_are_left_alone() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.1))
    watch = RateWatch()
    assert not watch.is_restart([optimizer])
    optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.5})
    assert not watch.is_restart([optimizer])
    optimizer.param_groups[1]["lr"] = 0.1
    assert not watch.is_restart([optimizer])
    optimizer.param_groups[1]["lr"] = 0.5
    assert watch.is_restart([optimizer])
