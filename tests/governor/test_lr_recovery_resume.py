"""Rates that are lowered for a time, in saved forms: the run goes on as if never interrupted."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowered_runs import FACTOR, SCHEDULES, Run

from tolaria.errors import UncoveredWarning
from tolaria.governor import TolariaGovernor, load_snapshot


@pytest.mark.parametrize("through", ["torch", "json"])
@pytest.mark.parametrize("is_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", ["none", "lambda", "cosine", "sequential"])
def test_a_run_resumed_on_the_way_goes_on_as_if_never_interrupted(
    name: str, is_tensor: bool, through: str
) -> None:
    whole = Run(SCHEDULES[name], is_tensor=is_tensor)
    _live(whole, whole.govern(10), range(1, 40))
    first = Run(SCHEDULES[name], is_tensor=is_tensor)
    _live(first, first.govern(10), range(1, 14))
    file = io.BytesIO()
    torch.save([first.settings(), first.optimizer.state_dict(), first.model.state_dict()], file)
    saved = first.governor.state_dict()
    if through == "json":
        saved = json.loads(json.dumps(saved, allow_nan=False))
    file.seek(0)
    settings, optimizer, model = torch.load(file, weights_only=False)
    second = Run(SCHEDULES[name], is_tensor=is_tensor)
    governor = second.govern(10)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.load(settings)
    governor.load_state_dict(saved)
    assert second.rates() == first.rates()
    _live(second, governor, range(14, 40))
    assert repr(second.settings()) == repr(whole.settings())
    assert all(map(torch.equal, second.model.parameters(), whole.model.parameters()))


def _live(run: Run, governor: TolariaGovernor, steps: range) -> None:
    for step in steps:
        run.train()
        if run.schedule is not None:
            run.schedule.step()
        governor.step(math.nan if step in (9, 12) else 1.0)


def test_a_state_on_disk_goes_on_from_its_capture(tmp_path: Path) -> None:
    run = Run(SCHEDULES["cosine"])
    governor = run.govern(10)
    _live(run, governor, range(1, 20))
    assert governor.last_good_step == 17, "of the lowered time"
    path = governor.save(tmp_path).result()
    _live(run, governor, range(20, 40))
    other = Run(SCHEDULES["cosine"])
    load_snapshot(path, other.govern(10))
    assert other.rates()[0] < 0.1
    _live(other, other.governor, range(18, 40))
    assert repr(other.settings()) == repr(run.settings())


def test_rates_that_do_not_fit_stay_as_they_are_and_say_so() -> None:
    first, second = Run(SCHEDULES["lambda"]), Run()
    first.govern(10).step(math.nan)
    governor = second.govern(10)
    with pytest.warns(UncoveredWarning, match="expected the 8 rates .* got optimizers and schedulers with 2"):
        governor.load_state_dict(first.governor.state_dict())
    for _ in range(12):
        governor.step(1.0)
    assert second.rates() == [0.3, 0.07]


def test_a_rate_that_was_not_loaded_is_its_own() -> None:
    first, second = Run(), Run()
    first.govern(10).step(math.nan)
    second.optimizer.param_groups[0]["lr"] = 0.3 * FACTOR  # as if loaded; the other group is not
    governor = second.govern(10)
    governor.load_state_dict(first.governor.state_dict())
    for _ in range(10):
        governor.step(1.0)
    assert second.rates() == [0.3, 0.07]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda r: r.update(own=[1.0]), "policy.rates.lowered: expected as many rates as in own, 1, got 0"),
        (lambda r: r.update(own=["x"], lowered=[1.0]), r"policy.rates.own\[0\]: expected a number"),
        (lambda r: r.update(times=-1), "policy.rates.times: expected a whole number"),
        (lambda r: r.pop("own"), "policy.rates: expected the keys .* lacks own"),
    ],
)
def test_damaged_rates_are_refused_by_name(damage: Callable[[Any], None], said: str) -> None:
    governor = Run().govern()
    saved = governor.state_dict()
    damage(saved["policy"]["rates"])
    with pytest.raises(ValueError, match=said):
        governor.load_state_dict(saved)


@pytest.mark.parametrize("name", ["none", "one-cycle", "sequential", "swa"])
@pytest.mark.parametrize("schedules", ["keep", "rewind"])
@pytest.mark.parametrize("seed", range(4))
def test_random_runs_end_at_their_own_rates(name: str, schedules: str, seed: int) -> None:
    chance = random.Random(f"{name} {schedules} {seed}")
    run, alone = Run(SCHEDULES[name]), Run(SCHEDULES[name])
    settings = {"snapshot_interval": chance.randint(3, 9), "cooldown": chance.choice([0, 3])}
    governor = run.govern(
        chance.randint(1, 15),
        schedules=schedules,
        max_rollbacks=10**6,
        max_restores_of_one_capture=10**6,
        **settings,
    )
    captures = {0: alone.settings()}
    for step in range(120):
        stepped = chance.random() < 0.8
        for each in (run, alone):
            each.train()
            if each.schedule is not None and stepped:
                each.schedule.step()
        governor.step(math.nan if step < 80 and chance.random() < 0.06 else 1.0)
        what = chance.choices(["nothing", "rollback", "snapshot", "load"], [0.92, 0.02, 0.03, 0.03])[0]
        if what == "rollback" and step < 80:
            governor.execute_rollback()
        elif what == "snapshot":
            governor.snapshot()
        for event in governor.poll():
            if event.kind == "capture":
                captures[event.capture_step] = alone.settings()  # type: ignore[attr-defined]
            elif event.kind == "rollback" and schedules == "rewind":
                alone.load(captures[event.report.restored_step])  # type: ignore[attr-defined]
        if what == "load":
            governor.load_state_dict(governor.state_dict())
            captures = dict.fromkeys((governor.last_good_step, governor.step_count), alone.settings())
    assert repr(run.settings()) == repr(alone.settings())
