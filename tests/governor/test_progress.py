"""Restores of one capture that lead nowhere end the run, by whatever way the host hears of them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tolaria
from tolaria.errors import TrainingDivergedError
from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor


@pytest.fixture(params=["fused", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    with tolaria.backend(request.param):
        yield


def make(**settings: Any) -> TolariaGovernor:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TolariaGovernor(model, optimizer, config=GovernorConfig(**{"snapshot_interval": 1000, **settings}))


def live_through(governor: TolariaGovernor, gaps: Sequence[int], bad: Sequence[float] = (math.nan,)) -> None:
    """So many healthy steps and then the losses of ``bad``, again and again."""
    for healthy in gaps:
        for _ in range(healthy):
            governor.step(1.0)
        for loss in bad:
            governor.step(loss)


@pytest.mark.parametrize(
    "gaps",
    [
        pytest.param([300, 0, 3, 9, 1], id="fewer-than-min-history"),
        pytest.param([7, 40, 40, 40, 40], id="all-by-the-same-number"),
        pytest.param([0, 0, 0, 0, 0], id="at-once"),
    ],
)
def test_no_progress_ends_the_run_at_the_restore_that_makes_it_clear(gaps: list[int]) -> None:
    governor = make()
    live_through(governor, gaps[:-1])
    with pytest.raises(
        TrainingDivergedError, match=r"capture 1 of step 0 was restored 5 times in a row"
    ) as error:
        live_through(governor, gaps[-1:])
    assert f"followed by {', '.join(map(str, gaps[1:]))} healthy steps" in str(error.value)
    for said in ("restore_rng=False", "lr_factor=1", "skips_before_rollback=0", "offending_steps"):
        assert said in str(error.value)
    assert [r.restored_capture for r in error.value.history] == [1] * 5
    assert governor.rollback_count == 5
    governor.step(1.0)
    governor.step(math.nan)  # said once; the count begins anew


@pytest.mark.parametrize(
    "gaps",
    [
        pytest.param([3, 3, 10, 3, 3, 3], id="enough-healthy-steps-in-one-gap"),
        pytest.param([40, 40, 40, 41, 40, 40, 40], id="never-four-alike"),
    ],
)
def test_progress_goes_on(gaps: list[int]) -> None:
    governor = make()
    live_through(governor, gaps)
    assert governor.rollback_count == len(gaps)


def test_a_newer_capture_is_progress() -> None:
    governor = make(snapshot_interval=4, probation=1)
    live_through(governor, [6] * 20)
    assert governor.rollback_count == 20


def test_steps_of_a_cooldown_and_bad_ones_are_not_healthy() -> None:
    for settings, gap in (({"cooldown": 20}, 25), ({"min_panics_before_rollback": 20}, 9)):
        governor = make(warmup_bound=50.0, **settings)
        spikes = [100.0] * 10 if "cooldown" not in settings else []
        live_through(governor, [0] + [gap] * 3, [*spikes, math.nan])
        with pytest.raises(TrainingDivergedError, match="no progress"):
            live_through(governor, [gap - 2], [*spikes, math.nan])


def test_rollbacks_by_hand_do_not_count() -> None:
    governor = make()
    for _ in range(12):
        governor.step(1.0)
        governor.execute_rollback()
    live_through(governor, [1, 1, 1, 1])
    governor.execute_rollback()
    with pytest.raises(TrainingDivergedError, match="no progress"):
        live_through(governor, [1])


@pytest.mark.parametrize(("most", "survived"), [(1, 0), (2, 1), (3, 2)])
def test_the_limit_is_a_setting(most: int, survived: int) -> None:
    governor = make(max_restores_of_one_capture=most)
    live_through(governor, [2] * survived)
    with pytest.raises(TrainingDivergedError, match=f"restored {most} times"):
        live_through(governor, [2])


def test_two_restores_far_apart_are_not_alike_yet() -> None:
    governor = make(max_restores_of_one_capture=2)
    live_through(governor, [50, 50, 50, 50])
    with pytest.raises(TrainingDivergedError, match="no progress"):
        live_through(governor, [3])


@pytest.mark.parametrize("weights_only", [True])
def test_the_count_goes_on_after_a_resume(weights_only: bool) -> None:
    first = make()
    live_through(first, [30, 2, 4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    second.load_state_dict(torch.load(file, weights_only=weights_only))
    live_through(second, [3])
    with pytest.raises(TrainingDivergedError, match="followed by 2, 4, 3, 1 healthy steps"):
        live_through(second, [1])


def test_dropped_events_neither_end_a_run_nor_hide_its_end() -> None:
    governor = make(event_capacity=3, max_rollbacks=1000, snapshot_interval=4, probation=1)
    follow, governor._follow = governor._follow, lambda: None  # type: ignore[method-assign]
    live_through(governor, [6] * 30)  # each of them restores a capture of its own; nobody looks
    follow()
    assert governor.rollback_count == 30
    live_through(governor, [0] * 30)  # one and the same
    governor._follow = follow  # type: ignore[method-assign]
    with pytest.raises(TrainingDivergedError, match="no progress"):
        live_through(governor, [0] * 6)


def test_an_end_heard_late_is_an_end() -> None:
    governor = make(snapshot_interval=20, probation=1)
    follow, governor._follow = governor._follow, lambda: None  # type: ignore[method-assign]
    live_through(governor, [1, 2, 3, 4, 5, 30])
    follow()
    assert governor.last_good_step > 0, "a newer capture was promoted since"
    with pytest.raises(TrainingDivergedError, match="followed by 2, 3, 4, 5 healthy steps"):
        governor._tell()
    governor.step(1.0)


def test_rows_of_a_bank_are_counted_apart() -> None:
    bank = GovernorBank(3, config=GovernorConfig(snapshot_interval=1000))
    for i in (0, 2):
        model = nn.Linear(2, 2)
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.1))
    nan, calm = math.nan, [12, 2, 2, 2, 2]
    for turn in range(4):
        for _ in range(calm[turn]):
            bank.step(torch.ones(3))
        bank.step(torch.tensor([nan, nan, nan if turn < 2 else 1.0]))
    bank.step(torch.tensor([1.0, nan, 1.0]))
    with pytest.raises(TrainingDivergedError, match="no progress"):
        bank.step(torch.tensor([nan, 1.0, 1.0]))
    assert bank.rollback_counts[2] == 2


@pytest.mark.parametrize("name", ["max_restores_of_one_capture", "max_rollbacks"])
def test_a_limit_of_any_size_is_a_limit(name: str) -> None:
    governor = make(**{"max_rollbacks": 10**6, name: 2**70})
    live_through(governor, [0] * 4)
    assert governor.rollback_count == 4
