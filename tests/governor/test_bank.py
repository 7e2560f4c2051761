"""Many environments in one launch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tolaria
from tolaria.governor import GovernorBank, GovernorConfig, PanicReason, RollbackEvent, TolariaGovernor


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def test_reward_comes_once_per_rollback_and_inactive_rows_keep_every_byte() -> None:
    bank = GovernorBank(4)
    for _ in range(12):
        assert bank.step(torch.ones(4)).tolist() == [0, 0, 0, 0]
    losses = torch.tensor([float("nan"), float("nan"), 1.0, 1.0])
    active = torch.tensor([True, False, True, True])
    before = bank._state[:, 1].clone()
    assert bank.step(losses, active=active).tolist() == [-10, 0, 0, 0]
    assert torch.equal(bank._state[:, 1], before)
    assert bank.step(torch.ones(4), active=~active).tolist() == [0, 0, 0, 0]
    assert bank.rollback_counts == [1, 0, 0, 0]
    (event,) = [e for e in bank.poll() if isinstance(e, RollbackEvent)]
    assert event.row == 0
    assert event.report.reason is PanicReason.NON_FINITE


def test_rows_judge_as_single_governors_do() -> None:
    n, steps = 5, 60
    source = torch.Generator().manual_seed(0)
    losses = torch.rand(steps, n, generator=source)
    losses[torch.rand(steps, n, generator=source) < 0.1] *= 1000
    bank = GovernorBank(n, num_classes=10)
    models = [nn.Linear(2, 2) for _ in range(n)]
    singles = [TolariaGovernor(m, torch.optim.SGD(m.parameters(), lr=0.1), num_classes=10) for m in models]
    for row in losses:
        bank.step(row)
        for governor, loss in zip(singles, row, strict=True):
            governor.step(loss)
    assert bank.rollback_counts == [g.rollback_count for g in singles]
    assert sum(bank.rollback_counts) > 0


def test_attached_row_gets_its_own_restore() -> None:
    bank = GovernorBank(3, config=GovernorConfig(snapshot_interval=5, probation=1))
    models = [nn.Linear(2, 2) for _ in range(2)]
    for i, model in enumerate(models):
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(8):
        with torch.no_grad():
            for model in models:
                model.weight.fill_(step)
        bank.step(torch.ones(3))
    losses = torch.tensor([1.0, float("nan"), float("nan")])
    assert bank.step(losses).tolist() == [0, -10, -10]
    assert models[0].weight.unique().tolist() == [7.0]
    assert models[1].weight.unique().tolist() == [4.0], "captured at the fifth step"
    bank.detach(1)
    assert bank.step(losses).tolist() == [0, -10, -10]
    assert models[1].weight.unique().tolist() == [4.0]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="n: expected an integer of at least 1, got 0"):
        GovernorBank(0)
    bank = GovernorBank(2)
    with pytest.raises(ValueError, match="i: expected a row from 0 to 1, got 2"):
        bank.attach(2, nn.Linear(1, 1), [])
    broken = nn.Linear(1, 1)
    nn.init.constant_(broken.weight, float("inf"))
    with pytest.raises(ValueError, match="weight"):
        bank.attach(0, broken, [])
    assert bank.step(torch.ones(2)).tolist() == [0, 0], "the rejected attach left the row as it was"
