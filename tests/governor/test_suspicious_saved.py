"""Histories of magnitudes: saved, resumed, in a bank; and the settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.suspicious_run import INTERVAL, Net, Run, suspicions
from tolaria.errors import ConfigError
from tolaria.governor import (
    GovernorBank,
    GovernorConfig,
    VerdictEvent,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("through", ["state_dict", "last_good"])
def test_a_resumed_run_knows_what_the_first_one_knew(place: str, through: str) -> None:
    run = Run(device=place)
    run.train(2 * INTERVAL)
    saved = run.governor.state_dict()
    if through == "last_good":
        saved = run.governor.last_good_state_dict()["governor"]
    assert saved["magnitudes"]["weight"][0] == 0.5
    other = Run(copy.deepcopy(run.model), place, steps=0)
    other.governor.load_state_dict(saved)
    other.to_capture()
    assert suspicions(other.train(2, lambda: other.model.weight.fill_(1e6))) == [("weight", False)]
    fresh = Run(copy.deepcopy(run.model), place, steps=0)
    fresh.to_capture()
    assert not suspicions(fresh.train(2, lambda: fresh.model.weight.fill_(1e6)))


def test_promoted_captures_are_counted_once_whatever_is_saved() -> None:
    """Judged from the same capture on, resumed or not."""
    for steps in range(3 * INTERVAL):
        whole = Run(steps=steps)
        part = Run(copy.deepcopy(whole.model), steps=0)
        part.governor.load_state_dict(whole.governor.state_dict())
        found = []
        for run in (whole, part):
            run.train(INTERVAL * 4 - steps)
            run.governor.state_dict()
            table = run.governor._engine.slots.table.magnitudes
            assert table is not None
            found.append(run.governor.state_dict()["magnitudes"])
        assert found[0] == found[1], steps


def test_reset_begins_every_history_anew() -> None:
    run = Run()
    run.governor.reset()
    run.to_capture()
    assert not suspicions(run.train(2, lambda: run.model.weight.fill_(1e6)))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ([], "magnitudes: expected a dict"),
        ({"weight": 3}, r"magnitudes\['weight'\]: expected two numbers, got 3"),
        ({"weight": [1.0]}, r"magnitudes\['weight'\]: expected two numbers"),
        ({"weight": ["inf", 1]}, r"magnitudes\['weight'\]: expected two numbers"),
        (
            {"weight": [-1.0, 1]},
            r"magnitudes\['weight'\]\[0\]: expected a finite number of at least 0, got -1.0",
        ),
        ({"weight": [1.0, 0.5]}, r"magnitudes\['weight'\]\[1\]: expected a whole number"),
        ({"weight": [1.0, -1]}, r"magnitudes\['weight'\]\[1\]: expected a whole number"),
        ({7: [1.0, 1]}, r"magnitudes\[7\]: expected the name of a tensor"),
    ],
)
def test_damaged_magnitudes_are_refused_by_name(damage: Any, said: str) -> None:
    run = Run()
    before = run.governor.state_dict()
    with pytest.raises(ValueError, match=said):
        run.governor.load_state_dict({**before, "magnitudes": damage})
    assert repr(run.governor.state_dict()) == repr(before)


def test_rows_of_a_bank_have_histories_of_their_own(place: str) -> None:
    models = [Net().to(place) for _ in range(3)]
    bank = GovernorBank(3, config=GovernorConfig(snapshot_interval=INTERVAL, probation=1), device=place)
    for i, model in enumerate(models):
        bank.attach(i, model, torch.optim.SGD(model.parameters(), lr=0.0))
    losses, told = torch.ones(3, device=place), []
    for step in range(6 * INTERVAL):
        if step == 5 * INTERVAL - 2:
            with torch.no_grad():
                models[1].weight.fill_(1e6)
        bank.step(losses)
        if place != "cpu":
            torch.cuda.synchronize()
        told += bank.poll()
    assert {e.row for e in told if isinstance(e, VerdictEvent)} == {1}
    assert {name for name, _ in suspicions(told)} == {"weight"}


@pytest.mark.parametrize("bad", [None, True, "undo", 1])
def test_other_settings_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="suspicious_state: expected 'off', 'tell' or 'rollback', got"):
        GovernorConfig(suspicious_state=bad)


def test_the_presets_say_what_is_done() -> None:
    assert GovernorConfig().suspicious_state == "tell"
    assert GovernorConfig.strict().suspicious_state == "rollback"
    assert GovernorConfig.classic().suspicious_state == "off"
