"""Rates that a rollback lowered for a time end where the schedule alone would have taken them, to the bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupting import Interruption
from lowered_runs import FACTOR, SCHEDULES, Run
from torch import nn

from tolaria.errors import ConfigError
from tolaria.governor import GovernorBank, GovernorConfig, PanicReason


@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("schedules", ["rewind", "keep"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_are_those_of_the_schedule_alone(name: str, schedules: str, is_tensor: bool) -> None:
    run, alone = (Run(SCHEDULES[name], is_tensor=is_tensor) for _ in range(2))
    governor = run.govern(schedules=schedules)
    captures, lowered = {0: alone.settings()}, []
    for step in range(1, 60):
        for each in (run, alone):
            each.train()
            if each.schedule is not None and step % 4:
                each.schedule.step()
        governor.step(math.nan if step in (9, 13, 14) else 1.0)
        for event in governor.poll():
            if event.kind == "capture":
                captures[event.capture_step] = alone.settings()  # type: ignore[attr-defined]
            elif event.kind == "rollback" and schedules == "rewind":
                alone.load(captures[event.report.restored_step])  # type: ignore[attr-defined]
        if run.rates() != alone.rates():
            lowered.append(step)
        if step in (9, 14):
            times = FACTOR ** (1 if step == 9 else 3)
            if name != "cyclic":
                assert run.rates() == pytest.approx([times * rate for rate in alone.rates()], rel=0.2)
    assert lowered == list(range(9, 26)), "12 healthy steps after step 14"
    assert repr(run.settings()) == repr(alone.settings())


def test_a_bad_step_that_is_let_pass_and_a_cooldown_begin_the_count_anew() -> None:
    run = Run()
    governor = run.govern(4, cooldown=3, warmup_bound=5.0, absolute_threshold=5.0)
    losses = [1.0, math.nan, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0, 1.0, 1.0, 1.0]
    for loss in losses:
        governor.step(loss)
    assert run.rates()[0] == 0.3 * FACTOR
    governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_a_healthy_step_whose_capture_is_only_told_of_counts() -> None:
    run = Run()
    governor = run.govern(8, suspicious_state="tell")
    for _ in range(21):
        governor.step(1.0)
    governor.step(math.nan)
    with torch.no_grad():
        run.model.weight.fill_(1e6)
    for _ in range(7):
        governor.step(1.0)
    assert "SUSPICIOUS_STATE" in [getattr(e, "reason", PanicReason.HEALTHY).name for e in governor.poll()]
    assert run.rates()[0] == 0.3 * FACTOR
    governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_without_recovery_the_rates_stay_lowered() -> None:
    run = Run()
    governor = run.govern(0)
    governor.step(math.nan)
    for _ in range(50):
        governor.step(1.0)
    assert run.rates()[0] == 0.3 * FACTOR


def test_a_capture_of_the_lowered_time_brings_the_own_rates_back() -> None:
    run = Run()
    governor = run.govern(8, snapshot_interval=5)
    governor.step(math.nan)
    for _ in range(7):
        governor.step(1.0)
    assert governor.last_good_step == 6, "it holds lowered rates"
    for _ in range(2):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]
    governor.execute_rollback()
    assert run.rates() == [0.3 * FACTOR, 0.07 * FACTOR], "once, since the last recovery"
    for _ in range(8):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_a_rate_that_was_set_by_hand_meanwhile_stays_as_it_was_set() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    governor.step(1.0)
    run.optimizer.param_groups[0]["lr"] = 0.123
    for _ in range(6):
        governor.step(1.0)
    assert run.rates() == [0.123, 0.07]


def test_a_rate_that_is_set_at_every_step_is_left_to_who_sets_it() -> None:
    run = Run()
    governor = run.govern(6)
    for step in range(1, 20):
        for group in run.optimizer.param_groups:
            group["lr"] = 0.5 / step
        governor.step(math.nan if step == 5 else 1.0)
        if step != 5:
            assert run.rates() == [0.5 / step] * 2


def test_a_group_that_joins_keeps_its_rate() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.9})
    for _ in range(6):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07, 0.9]


def test_reset_leaves_the_way_back_open() -> None:
    run = Run()
    governor = run.govern(6)
    governor.step(math.nan)
    governor.step(1.0)
    governor.reset()
    for _ in range(5):
        governor.step(1.0)
    assert run.rates() == [0.3, 0.07]


def test_rows_of_a_bank_recover_apart() -> None:
    bank = GovernorBank(2, config=GovernorConfig(lr_factor=FACTOR, lr_recovery_steps=5))
    runs = [Run(), Run()]
    for i, run in enumerate(runs):
        bank.attach(i, run.model, run.optimizer)
    bank.step(torch.tensor([math.nan, 1.0]))
    for _ in range(2):
        bank.step(torch.ones(2))
    bank.step(torch.tensor([1.0, math.nan]))
    for _ in range(2):
        bank.step(torch.ones(2))
    assert [run.rates()[0] for run in runs] == [0.3, 0.3 * FACTOR]


def test_a_clean_step_takes_the_shortest_way_before_and_after() -> None:
    run = Run()
    governor = run.govern(3)
    ways = [governor._attached.plain is not None]
    for loss in (1.0, math.nan, 1.0, 1.0, 1.0):
        governor.step(torch.tensor(loss))
        ways.append(governor._attached.plain is not None)
    assert ways == [True, True, False, False, False, True]


PLACES = ("policy.py", "following.py", "lowered_rates.py", "own_rates.py")
DETAIL = {"end_step", "_end_step", "recovered", "apply", "caught_up"}


@pytest.mark.parametrize("when", ["lowered", "recovered"])
def test_interrupted_anywhere_the_rates_are_lowered_or_their_own(when: str) -> None:
    def prepare() -> tuple[Run, Callable[[], None]]:
        run = Run(SCHEDULES["cosine"])
        governor = run.govern(4)
        for loss in [1.0] if when == "lowered" else [math.nan, 1.0, 1.0, 1.0]:
            governor.step(loss)
        return run, lambda: governor.step(math.nan if when == "lowered" else 1.0)

    whole = Interruption(within=PLACES, in_detail=DETAIL)
    run, call = prepare()
    before = run.rates()
    with whole.on():
        call()
    right = [0.3 * FACTOR, 0.07 * FACTOR] if when == "lowered" else [0.3, 0.07]
    assert run.rates() == right
    for at in range(0, len(whole.places), 11):
        run, call = prepare()
        interruption = Interruption(at, within=PLACES, in_detail=DETAIL)
        try:
            with interruption.on():
                call()
        except KeyboardInterrupt:
            assert run.rates() in (before, right), list(whole.places)[at]
        run.governor.step(1.0)
        if interruption.has_happened:
            assert run.rates() in (before, right) if when == "lowered" else run.rates() == right
        for _ in range(6):
            run.governor.step(1.0)
        assert run.rates() == [0.3, 0.07]
        assert run.schedule.base_lrs == [0.3, 0.07]  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [-1, 1.5, True, None])
def test_bad_settings_are_named(value: Any) -> None:
    for name in ("lr_recovery_steps", "skip_batches"):
        with pytest.raises(ConfigError, match=f"{name}: expected an integer of at least 0"):
            GovernorConfig(**{name: value})
