"""What is read without ``poll()``: is it quiet, what is pending, what was the last verdict."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from verified_runs import Run

import tolaria
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def test_quiet_is_finite_healthy_and_nothing_pending() -> None:
    run = Run(snapshot_interval=100)
    assert run.governor.is_quiet
    for _ in range(4):
        run.step()
    run.governor.step(1e4)  # one anomaly, of two
    assert not run.governor.is_quiet
    assert run.governor.pending.anomalies == 1
    run.step()
    assert run.governor.is_quiet
    run.poison("average")
    assert not run.governor.is_quiet
    assert not run.is_finite(), "it only looks"
    run.governor.verify()
    assert not run.governor.is_quiet, "it has just been rolled back"
    run.step()
    assert run.governor.is_quiet
    run.governor.check_vital_signs(math.nan)
    assert not run.governor.is_quiet
    assert run.governor.pending.rollback


def test_a_collapse_that_adds_up_is_not_quiet() -> None:
    model = nn.Linear(2, 1)
    config = GovernorConfig(snapshot_interval=10)
    governor = TolariaGovernor(
        model, torch.optim.SGD(model.parameters(), lr=0.1), config=config, num_classes=10
    )
    for i in range(40):
        governor.step([0.2, 0.9, 1.4, 0.3, 2.0][i % 5])
    assert governor.is_quiet
    for counted in range(1, 12):
        governor.step(math.log(10))
        verdict = governor.last_verdict
        assert verdict is not None
        assert verdict.is_healthy
        assert governor.pending.collapse == counted
        assert not governor.is_quiet
    governor.step(math.log(10))
    assert governor.rollback_count == 1


def test_a_shift_that_shows_is_not_quiet() -> None:
    model = nn.Linear(2, 1)
    config = GovernorConfig.balanced(gradient_norm=False)
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
    for i in range(100):
        governor.step(1.0 + 0.05 * (i % 3))
    assert governor.is_quiet
    while governor.pending.shift <= 9.0:  # 15% of 60
        assert governor.is_quiet
        governor.step(1.6)
    assert not governor.is_quiet
    assert governor.rollback_count == 0


def test_a_bad_validation_is_not_quiet() -> None:
    run = Run(snapshot_interval=100)
    for metric in (0.9, 0.9, 0.9, 0.1):
        assert run.governor.is_quiet
        assert run.governor.pending.validations == 0
        run.governor.step_validation(metric, higher_is_better=True)
    assert run.governor.pending.validations == 1
    assert not run.governor.is_quiet
    run.governor.step_validation(0.9, higher_is_better=True)
    assert run.governor.is_quiet


@pytest.mark.parametrize("how", ["off", "tell", "rollback"])
def test_a_capture_that_will_be_refused_is_not_quiet(how: str) -> None:
    run = Run(steps=20, snapshot_interval=4, probation=1, suspicious_state=how)
    run.step()
    assert run.governor.is_quiet
    with torch.no_grad():
        run.model[1].running_mean.fill_(1e6)
    run.governor.snapshot()
    assert run.governor.is_quiet == (how == "off")
    run.governor.step(1.0)
    assert run.governor.is_quiet == (how != "rollback"), "it is told, or undone"


def test_the_last_verdict_is_read_without_polling() -> None:
    run = Run(steps=0)
    assert run.governor.last_verdict is None
    run.step()
    verdict = run.governor.last_verdict
    assert verdict is not None
    assert (verdict.step, verdict.reason) == (1, PanicReason.HEALTHY)
    run.governor.step(math.nan)
    assert verdict.step == 1, "it is a copy"
    last = run.governor.last_verdict
    assert last is not None
    assert (last.step, last.reason) == (2, PanicReason.NON_FINITE)
    assert run.governor.check_vital_signs(1.0) is run.governor.last_verdict
    run.governor.step(run.governor.last_verdict)
    run.governor.close()
    assert run.governor.last_verdict is not None
