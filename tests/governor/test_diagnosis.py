"""A run that is given up says in plain words what was tried and what is at fault."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from tolaria.data import SkipBatches
from tolaria.errors import TrainingDivergedError
from tolaria.governor import GovernorConfig, PanicReason, TolariaGovernor
from tolaria.governor.diagnosis import find_fault, healthy_between
from tolaria.telemetry.verdict import GovernorReport

NAN = math.nan


def make(**settings: Any) -> TolariaGovernor:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TolariaGovernor(model, optimizer, config=GovernorConfig(**{"snapshot_interval": 1000, **settings}))


def live_through(
    governor: TolariaGovernor, gaps: Sequence[int], bad: Sequence[float] = (NAN,)
) -> TrainingDivergedError:
    return end_of(governor.step, [loss for healthy in gaps for loss in (*[1.0] * healthy, *bad)])


def end_of(step: Callable[[Any], object], losses: Iterable[Any]) -> TrainingDivergedError:
    try:
        for loss in losses:
            step(loss)
    except TrainingDivergedError as error:
        return error
    pytest.fail("the run went on")


@pytest.mark.parametrize(
    ("gaps", "bad", "settings", "at_fault", "why"),
    [
        pytest.param([3, 40, 40, 40, 40], [NAN], {}, "data", "after the same 40 healthy steps", id="same"),
        pytest.param([30, 0, 0, 0, 0], [NAN], {}, "state", "bad at once each time", id="at-once"),
        pytest.param(
            [20, 5, 7, 4, 6],
            [50.0, 60.0],
            {"warmup_bound": 5.0},
            "state",
            "after 5, 7, 4, 6 healthy steps the loss grew",
            id="grew",
        ),
        pytest.param([20, 5, 7, 4, 6], [NAN], {}, "unknown", "a single batch each time", id="single"),
        pytest.param([20], [NAN], {"max_restores_of_one_capture": 1}, "unknown", "too few", id="one"),
        pytest.param([40] * 3, [NAN], {"max_rollbacks": 3}, "data", "the same 40 healthy", id="budget-data"),
        pytest.param(
            [22, 15, 27],
            [50.0, 60.0],
            {"max_rollbacks": 3},
            "state",
            "after 15, 27 healthy",
            id="budget-state",
        ),
        pytest.param(
            [40] * 3, [NAN], {"max_rollbacks": 3, "cooldown": 4}, "data", "same 36 healthy", id="cooldown"
        ),
    ],
)
def test_what_is_at_fault(
    gaps: list[int], bad: list[float], settings: dict[str, Any], at_fault: str, why: str
) -> None:
    error = live_through(make(**settings), gaps, bad)
    assert error.at_fault == at_fault
    lines = str(error).splitlines()
    assert 3 <= len(lines) <= 6
    assert [line.split(":")[0] for line in lines[1:]] == ["tried", "at fault", "next"]
    assert why in lines[2]
    assert (at_fault if at_fault == "unknown" else f"the {at_fault}") in lines[2]
    assert f"step {error.history[-1].step}" in lines[0]  # type: ignore[attr-defined]


def test_the_figures_of_what_was_tried() -> None:
    governor = make(lr_factor=0.5, lr_recovery_steps=100, skip_batches=4, max_rollbacks=3, restore_rng=True)
    batches = iter(SkipBatches(range(1000), governor))
    error = end_of(governor.step, (50.0 + i if i % 13 in (11, 12) else 1.0 for i, _ in enumerate(batches)))
    tried = str(error).splitlines()[1]
    for said in (
        "3 rollbacks",
        "2 bad steps let pass",
        "8 batches left out (skip_batches=4)",
        "lowered to 0.0125 (times 0.125; lr_factor=0.5 at each rollback)",
        "restore_rng=True",
    ):
        assert said in tried
    assert error.at_fault == "data", "every 13 batches"


def test_rollbacks_by_hand_are_no_evidence() -> None:
    governor = make(max_rollbacks=4)

    def step(_: int) -> None:
        governor.step(1.0)
        governor.execute_rollback()

    error = end_of(step, range(4))
    assert error.at_fault == "unknown"
    assert "by hand" in str(error)


def test_the_error_travels_between_processes() -> None:
    error = live_through(make(), [3, 40, 40, 40, 40])
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.at_fault, repr(other.history)) == (str(error), "data", repr(error.history))
    assert TrainingDivergedError("over").at_fault == "unknown"


def report(step: int, **values: Any) -> GovernorReport:
    given = {
        "reason": PanicReason.ANOMALY, "loss": 50.0, "mean": 1.0, "std": 0.1, "thresholds": (1.0, 1.0, 1.0),
        "consecutive_panics": 1, "restored_capture": 1, "restored_step": 0, "steps_lost": 1, "reward": -10.0,
        "rollback_count": 1, **values,
    }  # fmt: skip
    return GovernorReport(step=step, **given)


@pytest.mark.parametrize(
    ("values", "steps", "at_fault"),
    [
        ({"reason": PanicReason.NON_FINITE_STATE, "tensor_name": "bn"}, (10, 20, 33), "state"),
        ({"reason": PanicReason.DRIFT}, (10, 20, 33), "state"),
        ({"reason": PanicReason.VALIDATION}, (10, 20, 30, 40), "state"),
        ({"reason": PanicReason.LOBOTOMY}, (10, 20, 30, 40), "state"),
        ({"std": 5.0}, (10, 20, 30, 40), "state"),  # the loss was on its way, the same way each time
        ({"reason": PanicReason.GRADIENT_NORM}, (10, 20, 30, 40), "data"),
        ({"reason": PanicReason.GRADIENT_NORM}, (10, 20, 33, 40), "unknown"),
        ({"reason": PanicReason.GRADIENT_NORM, "consecutive_panics": 2}, (10, 20, 33, 40), "state"),
        ({"loss": NAN, "mean": NAN, "std": NAN, "consecutive_panics": 0}, (10, 20, 33), "unknown"),
    ],
)
def test_reasons_and_figures_count(values: dict[str, Any], steps: tuple[int, ...], at_fault: str) -> None:
    reports = [report(step, **values) for step in steps]
    assert find_fault(reports, healthy_between(reports, 0))[0] == at_fault
