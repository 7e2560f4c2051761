"""``verify()``: may the live state be saved? And ``close()``, after which nobody looks any more."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from verified_runs import Run

import tolaria
from tolaria.errors import SnapshotError, TrainingDivergedError
from tolaria.governor import (
    GovernorBank,
    PanicReason,
    RollbackEvent,
    TolariaGovernor,
    VerdictEvent,
)


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


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


@pytest.mark.parametrize("how", ["verify", "execute_rollback", "step_validation"])
def test_an_extra_that_refuses_leaves_no_losses_of_the_state_that_is_gone(how: str) -> None:
    run = Run(validation_patience=1)
    run.governor.add_loss(5.0)
    run.average.refuses = True
    if how == "verify":
        run.poison("2.weight")
    calls = {"step_validation": lambda: run.governor.step_validation(math.nan, higher_is_better=True)}
    with pytest.raises(SnapshotError, match="not today"):
        calls.get(how, getattr(run.governor, how))()
    assert run.governor.rollback_count == 1
    with pytest.raises(TypeError, match="call add_loss before"):
        run.governor.step()


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
