"""What users validate is judged: a collapse of it is told, holds captures, and rolls back if it lasts."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from tolaria.errors import TrainingDivergedError
from tolaria.governor import (
    GovernorConfig,
    PromotionEvent,
    RollbackEvent,
    TolariaGovernor,
    ValidationEvent,
)
from tolaria.governor.validation import ValidationWindow
from tolaria.ops import PanicReason

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


class Run:
    """A run whose state says at which step it was."""

    def __init__(self, device: str = "cpu", **settings: object) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1, device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        settings = {"snapshot_interval": 5, "probation": 1, **settings}
        config = GovernorConfig(**settings)  # type: ignore[arg-type]
        self.governor = TolariaGovernor(self.model, self.optimizer, config=config)
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.governor.wait()  # no optimizer does, which would wait for a capture in flight
            with torch.no_grad():
                self.model.weight.fill_(float(self.step))
            self.governor.step(torch.tensor(1.0, device=self.model.weight.device))

    def validate(self, *values: float, higher: bool = True, steps: int = 10) -> list[bool]:
        found = []
        for value in values:
            self.train(steps)
            found.append(self.governor.step_validation(value, higher_is_better=higher) is not None)
        return found

    @property
    def live(self) -> float:
        return float(self.model.weight.detach()[0, 0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_collapse_that_lasts_is_rolled_back(device: str) -> None:
    run = Run(device)
    assert run.validate(90.0, 91.0, 92.0, 91.5, 10.0) == [False] * 5
    at_first, promoted = run.step, run.governor.last_good_step
    run.train(30)
    assert run.governor.last_good_step == promoted <= at_first  # held
    assert run.validate(11.0, steps=0) == [True]
    assert run.live == promoted
    report = run.governor.last_report
    assert report is not None
    assert report.reason is PanicReason.VALIDATION
    events = [e for e in run.governor.poll() if isinstance(e, ValidationEvent | RollbackEvent)]
    assert [type(e).__name__ for e in events] == ["ValidationEvent", "ValidationEvent", "RollbackEvent"]
    run.train(20)
    assert run.governor.last_good_step > at_first  # released


@pytest.mark.parametrize(
    ("values", "higher", "found"),
    [
        ([0.9, 0.91, 0.92, 0.1, 0.91, 0.1, 0.92], True, 0),  # each time back at once
        ([0.9, 0.91, 0.92, 0.1, 0.1], True, 1),
        ([10.0, 60.0, 80.0, 95.0, 96.0], True, 0),  # it learns
        ([2.0, 1.5, 1.2, 1.1, 1.0], False, 0),
        ([1.2, 1.1, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4], False, 0),  # it overfits
        ([1.2, 1.1, 1.0, 8.0, 9.0], False, 1),
        ([90.0, 91.0, 92.0, math.nan, math.nan], True, 1),
        ([math.nan, math.nan], True, 1),
        ([0.5, 0.1], True, 0),  # too few to tell
        ([0.0, 0.0, 0.0, 0.0], True, 0),
        ([0.0, 0.0, 0.0, 1e-9, 1e-9], False, 0),  # nothing says what is far from 0
        ([-3.0, -3.1, -3.2, -3.1], False, 0),
        ([-3.0, -3.1, -3.2, 2.0, 2.0], False, 1),
        ([1e-4, 1.1e-4, 1.2e-4, 1e-2, 1e-2], False, 1),
    ],
)
def test_what_is_a_collapse(values: list[float], higher: bool, found: int) -> None:
    assert sum(Run().validate(*values, higher=higher, steps=1)) == found


def test_patience_and_log_only() -> None:
    assert sum(Run(validation_patience=1).validate(0.9, 0.9, 0.9, 0.1)) == 1
    assert sum(Run(validation_patience=4).validate(0.9, 0.9, 0.9, 0.1, 0.1, 0.1)) == 0
    run = Run(log_only=True)
    assert sum(run.validate(0.9, 0.9, 0.9, 0.1, 0.1)) == 0
    assert run.live == run.step
    told = [e.rollback for e in run.governor.poll() if isinstance(e, ValidationEvent)]
    assert told == [False, True]


def test_a_bad_value_is_no_part_of_what_others_are_compared_with() -> None:
    run = Run(validation_patience=1000)
    run.validate(0.9, 0.91, 0.92, *[0.1] * 30, steps=1)
    (last,) = run.governor.poll()[-1:]
    assert isinstance(last, ValidationEvent)
    assert last.bad_in_a_row == 30
    assert last.bound is not None
    assert 0.5 < last.bound < 0.9


@pytest.mark.parametrize("metric", [0.5, torch.tensor(0.5), torch.tensor([0.5], dtype=torch.bfloat16), 1])
def test_a_metric_may_be_a_number_or_a_tensor(metric: object) -> None:
    assert Run().governor.step_validation(metric, higher_is_better=True) is None  # type: ignore[arg-type]


def test_bad_arguments_change_nothing() -> None:
    run = Run()
    run.validate(0.9, 0.9, 0.9)
    before = run.governor.state_dict()
    for metric, higher, error, words in (
        ("x", True, TypeError, "metric: expected a number"),
        (torch.ones(2), True, ValueError, r"metric: expected one value, got shape \(2,\)"),
        (torch.ones(1, dtype=torch.long), True, TypeError, "metric: expected a floating tensor"),
        (0.5, 1, TypeError, "higher_is_better: expected True or False, got int"),
        (0.5, False, ValueError, "higher_is_better: expected True, as before, got False"),
    ):
        with pytest.raises(error, match=words):
            run.governor.step_validation(metric, higher_is_better=higher)  # type: ignore[arg-type]
    assert run.governor.state_dict() == before
    run.governor.close()
    with pytest.raises(RuntimeError, match="it is closed"):
        run.governor.step_validation(0.5, higher_is_better=True)


def test_a_resumed_run_goes_on_validating() -> None:
    run = Run()
    run.validate(0.9, 0.91, 0.92, 0.1)
    saved = json.loads(json.dumps(run.governor.state_dict()))
    other = Run()
    other.governor.load_state_dict(saved)
    before = other.live
    other.train(20)
    assert not any(isinstance(event, PromotionEvent) for event in other.governor.poll())  # held
    assert other.validate(0.1, steps=0) == [True]
    assert other.live == before
    for place, value, words in (
        ("values", [0.9, math.inf, 0.9], "expected a finite number"),
        ("values", ["x"], "expected a number"),
        ("direction", 3, "expected 0 to 2"),
        ("bad_steps", [-1], "expected a whole number"),
        ("steps", [1], "steps: expected as many as values, 3, got 1"),
    ):
        policy = {**saved["policy"], "validation": {**saved["policy"]["validation"], place: value}}
        with pytest.raises(ValueError, match=words):
            other.governor.load_state_dict({**saved, "policy": policy})


def test_the_bound_lies_on_the_worse_side() -> None:
    window = ValidationWindow(2)
    assert window.bound() is None
    for value in (0.80, 0.82, 0.84, 0.86):
        window.judge(value, 1, higher_is_better=True)
    bound = window.bound()
    assert bound is not None
    assert math.isclose(bound, 0.83 - 6 * 0.05 * 0.83)


def told(run: Run) -> list[tuple[int, bool]]:
    return [(e.bad_in_a_row, e.rollback) for e in run.governor.poll() if isinstance(e, ValidationEvent)]


def test_a_rollback_takes_the_values_of_later_states_away() -> None:
    run = Run(snapshot_interval=1000)
    assert run.validate(10.0, 30.0, *[90.0] * 8, steps=1) == [False] * 10
    run.governor.step(math.nan)
    assert run.governor.last_report is not None
    assert run.governor.last_report.restored_step == 0
    assert run.validate(10.0, 30.0, 60.0, 80.0) == [False] * 4, "it learns once more"
    assert told(run) == []


def test_values_up_to_the_restored_state_stay() -> None:
    run = Run(snapshot_interval=5)
    run.validate(90.0, 91.0, 92.0, 91.0, steps=6)
    assert run.governor.last_good_step > 18
    run.governor.step(math.nan)
    assert run.validate(10.0, 11.0, steps=1) == [False, True]


def test_a_bad_value_of_a_state_that_is_gone_does_not_count() -> None:
    run = Run()
    run.validate(90.0, 91.0, 92.0, 10.0)
    run.governor.step(math.nan)
    assert run.validate(10.0, 90.0) == [False, False]
    assert told(run) == [(1, False), (1, False)]


def test_what_is_saved_of_the_last_known_good_state_is_of_then() -> None:
    run = Run(snapshot_interval=25)
    run.validate(90.0, 91.0, 92.0, 91.0, 10.0)
    form = run.governor.last_good_state_dict()["governor"]
    other = Run()
    other.governor.load_state_dict(json.loads(json.dumps(form)))
    saved = other.governor.state_dict()["policy"]["validation"]
    assert (saved["values"], saved["steps"], saved["bad_steps"]) == ([90.0, 91.0], [10, 20], [])
    other.train(30)
    assert other.governor.last_good_step > run.governor.last_good_step, "nothing is held"


def test_a_capture_by_hand_that_was_held_holds_nothing_later() -> None:
    run = Run(snapshot_interval=1000)
    run.validate(90.0, 91.0, 92.0, 10.0)
    run.governor.snapshot()
    by_hand = run.step
    run.train(5)
    assert run.governor.last_good_step == 0
    run.validate(91.0, steps=0)
    run.train(2)
    assert run.governor.last_good_step == by_hand
    run.governor.step(math.nan)
    run.governor.snapshot()
    again = run.governor.step_count
    run.train(2)
    assert run.governor.last_good_step == again


def test_the_metric_may_need_a_gradient(recwarn: pytest.WarningsRecorder) -> None:
    metric = torch.tensor(0.5, requires_grad=True) * 1.0
    assert Run().governor.step_validation(metric, higher_is_better=True) is None
    assert not recwarn.list


def test_no_single_batch_is_to_blame() -> None:
    run = Run(snapshot_interval=1000, max_rollbacks=3, validation_patience=1)
    with pytest.raises(TrainingDivergedError, match="what was validated collapsed") as caught:
        run.validate(*[90.0, 91.0, 92.0, math.nan] * 3)
    assert caught.value.at_fault == "state"
    assert run.governor.offending_steps == ()
