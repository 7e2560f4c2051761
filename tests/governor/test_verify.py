"""``verify()``: may the live state be saved? And ``close()``, after which nobody looks any more."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria.errors import SnapshotError, TrainingDivergedError
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    PanicReason,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


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


PLACES = ["2.weight", "1.running_var", "average", "exp_avg_sq"]


@pytest.mark.parametrize("place", PLACES)
def test_a_state_that_is_not_finite_is_found_named_and_rolled_back(place: str) -> None:
    run = Run()
    assert run.governor.verify()
    assert run.governor.poll() == []
    run.poison(place)
    found = run.governor.verify()
    assert not found
    assert place in str(found.tensor_name)
    assert found.report is not None
    assert found.report == run.governor.last_report
    assert (found.report.reason, found.report.tensor_name) == (
        PanicReason.NON_FINITE_STATE,
        found.tensor_name,
    )
    assert (found.report.reward, run.governor.rollback_count) == (-10.0, 1)
    assert run.is_finite()
    assert run.governor.verify()
    run.step()
    assert run.governor.rollback_count == 1


@pytest.mark.parametrize("place", PLACES)
def test_what_the_last_step_does_does_not_outlive_the_training(place: str) -> None:
    run = Run()
    run.poison(place)
    run.governor.close()
    assert run.is_finite()
    assert any(isinstance(e, RollbackEvent) for e in run.governor.poll())
    run.governor.close()
    assert run.governor.rollback_count == 1


def test_a_moment_that_the_very_first_step_brought_is_found() -> None:
    run = Run(steps=0)
    loss = run.model(torch.randn(8, 3)).square().mean() * math.nan
    loss.backward()
    run.optimizer.step()
    found = run.governor.verify()
    assert not found
    assert run.is_finite()
    assert not run.optimizer.state
    assert found.report is not None
    for value in (found.report.loss, found.report.mean, *found.report.thresholds, found.report.gradient_norm):
        assert math.isnan(value), "nothing was judged yet"


def test_only_waiting_rolls_nothing_back() -> None:
    run = Run()
    run.poison("2.weight")
    run.governor.synchronize()
    assert not run.is_finite()


def test_a_healthy_candidate_is_left_alone() -> None:
    run = Run(steps=0, snapshot_interval=10, probation=3)
    for _ in range(10):
        run.step()
    assert run.governor.pending.probation == 0
    run.step()
    run.governor.verify()
    assert run.governor.pending.probation == 1
    for _ in range(2):
        run.step()
    assert run.governor.last_good_step == 10


def test_a_rollback_that_was_called_for_is_carried_out() -> None:
    run = Run()
    verdict = run.governor.check_vital_signs(math.nan)
    assert verdict
    assert run.governor.pending.rollback
    found = run.governor.verify()
    assert not found
    assert found.tensor_name is None
    assert found.report is not None
    assert found.report.reason is PanicReason.NON_FINITE
    run.governor.step(verdict)
    assert run.governor.rollback_count == 1


def test_log_only_tells_and_leaves_it() -> None:
    run = Run(log_only=True)
    run.poison("2.weight")
    found = run.governor.verify()
    assert (bool(found), found.tensor_name, found.report) == (False, "2.weight", None)
    (event,) = run.governor.poll()
    assert isinstance(event, VerdictEvent)
    assert (event.reason, event.tensor_name) == (PanicReason.NON_FINITE_STATE, "2.weight")
    run.governor.close()
    assert not run.is_finite()
    assert run.governor.rollback_count == 0


def test_a_buffer_that_joins_as_a_mask_is_exempt() -> None:
    run = Run()
    run.model.register_buffer("late", torch.tensor([-math.inf]))
    assert run.governor.verify()
    run.step()
    assert run.governor.verify()


def test_a_state_that_cannot_go_back_closes_all_the_same() -> None:
    run = Run()
    run.poison("2.weight")
    run.average.refuses = True
    with pytest.raises(SnapshotError, match="not today"):
        run.governor.close()
    assert run.is_finite(), "everything else is back"
    with pytest.raises(RuntimeError, match="closed"):
        run.governor.verify()


def test_a_state_that_cannot_be_looked_at_is_told_and_saved_all_the_same(tmp_path: Path) -> None:
    run = Run(save_every=1, save_path=str(tmp_path))
    heard: list[str] = []
    run.governor.add_sink(lambda event: heard.append(event.kind))
    run.average.values = None  # type: ignore[assignment]
    run.average.state_dict = lambda: 1 / 0  # type: ignore[method-assign]
    run.governor._engine.tell_bad("told")
    with pytest.raises(SnapshotError, match="average"):
        run.governor.close()
    saved = [path for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert [path.name for path in saved] == ["step_000000004"]
    assert heard == ["verdict"]


def test_with_closes_and_hands_the_error_on() -> None:
    run = Run()

    def train() -> None:
        with run.governor as governor:
            assert governor is run.governor
            run.poison("2.weight")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert run.is_finite()
    with pytest.raises(RuntimeError, match="closed"):
        run.governor.step(1.0)


def test_too_many_rollbacks_end_the_run_but_not_its_end() -> None:
    run = Run(max_rollbacks=1)
    run.poison("2.weight")
    with pytest.raises(TrainingDivergedError):
        run.governor.verify()
    run.poison("2.weight")
    run.governor.close()
    assert run.is_finite()


def test_float8_and_complex_state_is_looked_at_each_time() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("small", torch.ones(2).to(torch.float8_e4m3fn))
    model.wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    governor = TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert governor.verify()
    model.small.copy_(torch.tensor([math.nan, 1.0]).to(torch.float8_e4m3fn))
    assert governor.verify().tensor_name == "small"
    assert governor.verify()
    with torch.no_grad():
        model.wave[1] = complex(1.0, math.inf)
    assert governor.verify().tensor_name == "wave"
    assert governor.verify()


def test_rows_of_a_bank_are_verified_apart_and_when_they_leave() -> None:
    bank = GovernorBank(3)
    models = [nn.Linear(2, 2) for _ in range(2)]
    for i, model in enumerate(models):
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        for model in models:
            model.weight[0, 0] = math.nan
    found = bank.verify(1)
    assert (bool(found), found.tensor_name) == (False, "weight")
    assert bool(models[1].weight.isfinite().all())
    assert not bool(models[0].weight.isfinite().all())
    bank.detach(0)
    assert bool(models[0].weight.isfinite().all())
    assert bank.rollback_counts == [1, 1, 0]
    with pytest.raises(ValueError, match="i: expected a row with a model, got 0"):
        bank.verify(0)


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
