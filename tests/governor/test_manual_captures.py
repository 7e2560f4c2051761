"""Captures by hand, however often they are asked for, starve no promotion."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn
from verified_runs import Run

import tolaria
from tolaria.governor import GovernorConfig, TolariaGovernor


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def test_a_manual_capture_at_every_step_starves_no_promotion() -> None:
    run = Run(steps=0, snapshot_interval=1000, probation=3)
    for step in range(1, 31):
        run.step()
        run.governor.snapshot()
        assert step - run.governor.last_good_step <= 2 * 3 + 1
    run.governor.step(math.nan)
    report = run.governor.last_report
    assert report is not None
    assert report.restored_step >= 24


@pytest.mark.parametrize("every", [1, 7])
def test_nor_where_steps_between_do_not_count(every: int) -> None:
    model, source = nn.Linear(2, 1), random.Random(1)
    governor = TolariaGovernor(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        config=GovernorConfig.balanced(gradient_norm=False),
        num_classes=2,  # a noisy problem: now and then a loss of guessing, and of more
    )
    ages = []
    for step in range(1, 601):
        governor.step(source.lognormvariate(math.log(0.45), 0.5))
        if step % every == 0:
            governor.snapshot()
        ages.append(step - governor.last_good_step)
    assert max(ages) < 100
    assert governor.rollback_count == 0


def test_after_a_bad_step_has_discarded_it_another_one_is_made_at_once() -> None:
    run = Run(steps=12, snapshot_interval=1000, probation=5)
    run.governor.snapshot()
    run.step()
    run.governor.step(1e4)
    assert run.governor.pending.probation is None
    run.governor.snapshot()
    assert run.governor.pending.probation == 0
    for _ in range(5):
        run.step()
    assert run.governor.last_good_step == 14


def test_a_manual_capture_that_has_to_wait_is_of_the_newest_state() -> None:
    run = Run(steps=0, snapshot_interval=1000, probation=3)
    run.step()
    run.governor.snapshot()
    run.step()
    run.governor.snapshot()  # would end the probation of the first
    for _ in range(2):
        run.step()
    assert run.governor.last_good_step == 1
    assert run.governor.pending.probation == 0
    for _ in range(3):
        run.step()
    assert run.governor.last_good_step == 4


def test_a_manual_capture_replaces_one_of_the_schedule_and_one_of_the_same_step() -> None:
    run = Run(steps=4, snapshot_interval=4, probation=3)
    assert run.governor.pending.probation == 0
    run.step()
    run.governor.snapshot()
    with torch.no_grad():
        run.model[2].bias.fill_(7.0)
    run.governor.snapshot()
    assert run.governor.pending.probation == 0
    for _ in range(3):
        run.step()
    assert run.governor.last_good_step == 5
    run.governor.execute_rollback()
    assert run.model[2].bias.tolist() == [7.0, 7.0]


def test_a_manual_capture_waits_for_nothing_that_a_rollback_has_taken() -> None:
    run = Run(steps=0, snapshot_interval=1000, probation=5)
    run.step()
    run.governor.snapshot()
    run.step()
    run.governor.snapshot()
    run.governor.step(math.nan)
    assert run.governor.pending.probation is None
    for _ in range(6):
        run.step()
    assert run.governor.pending.probation is None
    run.governor.snapshot()
    assert run.governor.pending.probation == 0
