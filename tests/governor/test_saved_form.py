"""A damaged or crafted state_dict is refused by the name of what is wrong; one that a run saves never is."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from judged_runs import SETTINGS, carry_out_captures, losses_like_a_run, norms_like_a_run
from saved_forms import WINDOW, assert_refused, changed, make, places, through_a_file, through_json, without

from tolaria import ops
from tolaria.governor import GovernorConfig
from tolaria.governor.plain_values import plain, revived
from tolaria.governor.saved_form import VERSION
from tolaria.governor.saved_state import checked_state
from tolaria.ops import MemoryField, memory_row

NAN, INF = math.nan, math.inf
# What may be any number, and what any finite one.
ANY = {"loss", "mean", "std", "threshold_absolute", "threshold_statistical", "threshold_multiplier"}
ANY |= {"gradient_norm", "gradient_threshold", "life_mean"}
FINITE = {"life_min", "life_max", "last_healthy", "drift_mean", "learnt_level"}
FINITE |= {"shift_level", "shift_top", "shift_fast"}
NOT_BELOW_0 = {"life_m2", "drift_variance", "drift", "drift_sum", "collapse"}
NOT_BELOW_0 |= {"shift_spread", "shift_wander", "shift_sum", "shift_gradient"}
AT_MOST_0 = {"reward"}


def bad_values(name: str) -> list[float]:
    last = name.rpartition(".")[2]
    if last in ANY:
        return []
    if last in FINITE:
        return [NAN, INF, -INF]
    if last in NOT_BELOW_0:
        return [-1.0, -INF] if last == "life_m2" else [NAN, INF, -1.0]
    if last in AT_MOST_0:
        return [NAN, -INF, 1.0]
    return [NAN, INF, -INF, -2.0, -5000.0, 0.5, 12.5, 2.0**53, 2.0**63, 1e300]


@pytest.mark.parametrize(("name", "row"), places(), ids=[name for name, _ in places()])
def test_every_field_that_indexes_counts_or_selects_is_checked(name: str, row: int) -> None:
    governor = make()
    saved = through_a_file(governor.state_dict())
    for value in bad_values(name):
        for written in (value, plain(value)):
            crafted = {**saved, "state": [*saved["state"][:row], written, *saved["state"][row + 1 :]]}
            assert_refused(governor, crafted, rf"state\.{name}: expected .*, got ")
    with torch.no_grad():
        weight = governor._engine.covered.model.get_parameter("weight")
        kept = weight.clone()
        weight.fill_(NAN)
    governor.step(NAN)
    assert torch.equal(weight, kept)


IMPOSSIBLE = {
    "attached": 0.0,
    "reason": 99.0,
    "history_size": 21.0,
    "slot_1.gradient_size": 21.0,
    "drift_count": 2.0,
    "cooldown_left": 1.0,
    "candidate": 2.0,
    "last_good": 2.0,
    "candidate_done": 4.0,
    "consecutive": 29.0,
    "lobotomy_pending": 1e6,
    "panics": 29.0,
    "life_count": 29.0,
    "steps_lost": 29.0,
    "promotion_count": 1e6,
    "life_min": 3.0,
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_run_reaches_is_refused(name: str) -> None:
    governor = make()
    saved = governor.state_dict()
    saved["state"][dict(places())[name]] = IMPOSSIBLE[name]
    assert_refused(governor, saved, rf"state\.{name}: expected ")


@pytest.mark.filterwarnings("ignore:governor. gradient_norm is asked for")
@pytest.mark.parametrize("kind", ["losses", "gradient_norms"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_counts_is_finite_and_one_beyond_the_size_is_nothing(kind: str, value: float) -> None:
    governor = make(gradient_norm=True)
    saved = governor.state_dict()
    first = memory_row(0, WINDOW, len(MemoryField)) + WINDOW * (kind == "gradient_norms")
    size = MemoryField.history_size if kind == "losses" else MemoryField.gradient_size
    saved["state"][memory_row(0, WINDOW, size)] = 5.0
    saved["state"][first + 5] = value
    make().load_state_dict(saved)
    saved["state"][first + 4] = value
    assert_refused(governor, saved, rf"state\.{kind}\[4\]: expected a finite number, got ")


def deep() -> list[Any]:
    """Lists in lists, more than Python calls."""
    nest: list[Any] = []
    for _ in range(100_000):
        nest = [nest]
    return nest


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no-version": (without("version"), "version: expected 5, or 2 to 4, .* got None"),
    "version-1": (changed("version", 1), "version: expected 5, .* got 1;"),
    "version-99": (changed("version", 99), "version: expected 5, .* got 99;"),
    "version-true": (changed("version", True), "version: expected 5"),
    "version-tensor": (changed("version", torch.tensor([2, 3])), "version: expected 5"),
    "no-state": (without("state"), "lacks state"),
    "no-config": (without("config"), "lacks config"),
    "no-policy": (without("policy"), "lacks policy"),
    "no-guess": (without("random_guess_loss"), "lacks random_guess_loss"),
    "more": (changed("slots", 3), "no other keys .* got 'slots'"),
    "more-no-name": (lambda saved: saved.update({3: 4}), "no other keys .* got 3"),
    "state-none": (changed("state", None), "state: expected a list of numbers, got NoneType"),
    "state-tensor": (
        changed("state", lambda s: torch.zeros(len(s), 1)),
        "state: expected a list of numbers, got Tensor",
    ),
    "state-text": (changed("state", str), "state: expected a list of numbers, got str"),
    "state-dict": (
        changed("state", lambda s: dict(enumerate(s))),
        "state: expected a list of numbers, got dict",
    ),
    "state-short": (changed("state", lambda s: s[:-1]), r"state: expected \d+ numbers, got \d+"),
    "state-long": (changed("state", lambda s: [*s, 0.0]), r"state: expected \d+ numbers, got \d+"),
    "state-empty": (changed("state", []), r"state: expected \d+ numbers, got 0"),
    "state-nested": (
        changed("state", lambda s: [[v] for v in s]),
        r"state\[0\]: expected a number, got list",
    ),
    "state-word": (changed("state", lambda s: ["1.0", *s[1:]]), r"state\[0\]: expected a number, got '1.0'"),
    "state-other-word": (
        changed("state", lambda s: ["NaN", *s[1:]]),
        r"state\[0\]: expected a number, got 'NaN'",
    ),
    "state-true": (changed("state", lambda s: [True, *s[1:]]), r"state\[0\]: expected a number, got True"),
    "state-hole": (changed("state", lambda s: [None, *s[1:]]), r"state\[0\]: expected a number, got None"),
    "state-huge": (changed("state", lambda s: [10**400, *s[1:]]), r"state\[0\]: expected a number, got int"),
    "state-deep": (changed("state", lambda s: [deep(), *s[1:]]), r"state\[0\]: expected a number, got list"),
    "config-deep": (
        changed("config.rule", lambda _: deep()),
        "config.rule: expected a plain value, got list",
    ),
    "reports-deep": (
        changed("policy.reports", lambda _: deep()),
        r"policy.reports\[0\]: expected a dict, got list",
    ),
    "guess-nan": (changed("random_guess_loss", NAN), "random_guess_loss: expected a positive finite"),
    "guess-negative": (changed("random_guess_loss", -1.0), "random_guess_loss: .* got -1.0"),
    "guess-inf": (changed("random_guess_loss", INF), "random_guess_loss: .* got inf"),
    "guess-zero": (changed("random_guess_loss", 0), "random_guess_loss: .* got 0"),
    "guess-huge": (changed("random_guess_loss", 10**400), "random_guess_loss: .* got int"),
    "guess-text": (changed("random_guess_loss", "2.3"), "random_guess_loss: .* got '2.3'"),
    "guess-true": (changed("random_guess_loss", True), "random_guess_loss: .* got True"),
    "guess-tensor": (changed("random_guess_loss", torch.ones(2)), "random_guess_loss: .* got Tensor"),
    "config-list": (changed("config", [1]), "config: expected a dict, got list"),
    "config-none": (changed("config", None), "config: expected a dict, got None"),
    "config-lacks": (without("config.window"), "config: expected the keys .*, it lacks window"),
    "config-more": (changed("config.colour", 1), "config: expected no other keys .* got 'colour'"),
    "config-no-name": (
        lambda saved: saved["config"].update({1: 1}),
        "config: expected no other keys .* got 1",
    ),
    "config-window": (changed("config.window", 2**40), "window: expected an integer"),
    "config-window-5": (changed("config.window", 12), r"state: expected \d+ numbers, got \d+"),
    "config-negative": (changed("config.cooldown", -1), "cooldown: expected an integer"),
    "config-nan": (changed("config.sensitivity", NAN), "sensitivity: expected a number"),
    "config-huge": (changed("config.snapshot_interval", 10**400), "config.snapshot_interval: expected"),
    "config-tensor": (changed("config.rule", torch.ones(2)), "config.rule: expected a plain value"),
    "config-bytes": (changed("config.rule", b"all"), "config.rule: expected a plain value"),
    "config-band": (
        changed("config.lobotomy_band", [[1], 2]),
        "config.lobotomy_band: expected a plain value",
    ),
    "config-events": (changed("config.event_capacity", 1 << 40), "event_capacity: expected an integer"),
    "policy-none": (changed("policy", None), "policy: expected a dict"),
    "policy-lacks": (without("policy.reports"), "policy: expected the keys .* lacks reports"),
    "policy-more": (changed("policy.x", 1), "policy: expected no other keys"),
    "steps-text": (changed("policy.offending_steps", "1"), "policy.offending_steps: expected a list"),
    "steps-float": (
        changed("policy.offending_steps", [1.5]),
        r"policy.offending_steps\[0\]: expected a whole",
    ),
    "steps-huge": (
        changed("policy.offending_steps", [2**80]),
        r"policy.offending_steps\[0\]: expected a whole",
    ),
    "reports-none": (changed("policy.reports", None), "policy.reports: expected a list"),
    "report-none": (changed("policy.reports", [None]), r"policy.reports\[0\]: expected a dict"),
    "report-lacks": (
        without("policy.reports.0.step"),
        r"policy.reports\[0\]: expected the keys .* lacks step",
    ),
    "report-more": (changed("policy.reports.0.x", 1), r"policy.reports\[0\]: expected no other keys"),
    "report-reason": (changed("policy.reports.0.reason", 99), r"policy.reports\[0\].reason: .* got 99"),
    "report-step": (changed("policy.reports.0.step", -7), r"policy.reports\[0\].step: .* got -7"),
    "report-step-nan": (changed("policy.reports.0.step", NAN), r"policy.reports\[0\].step: .* got nan"),
    "report-loss": (changed("policy.reports.0.loss", None), r"policy.reports\[0\].loss: expected a number"),
    "report-name": (changed("policy.reports.0.tensor_name", 3), r"policy.reports\[0\].tensor_name: .* got 3"),
    "report-thresholds": (
        changed("policy.reports.0.thresholds", [1.0, 2.0]),
        r"policy.reports\[0\].thresholds: expected three numbers",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_named(kind: str) -> None:
    governor = make()
    damage, said = DAMAGED[kind]
    saved = copy.deepcopy(governor.state_dict())
    damage(saved)
    assert_refused(governor, saved, said)
    governor.step(1.0)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("horizon", [0, 1, 2, 12])
def test_no_state_that_a_run_reaches_is_refused(name: str, horizon: int) -> None:
    config = GovernorConfig(**{**SETTINGS[name], "drift_horizon": horizon, "snapshot_interval": 5})
    settings, n = config.to_tensor(math.log(10), "cpu"), 6
    for seed in range(3):
        state = ops.governor_state(n, window=config.window)
        losses, norms = losses_like_a_run(n, 60, seed), norms_like_a_run(n, 60, seed)
        source = torch.Generator().manual_seed(seed)
        for step in range(60):
            ops.governor_step_(state, settings, losses[step], None, None, None, norms[step])
            for row in range(n):
                column = state[:, row : row + 1]
                kept = checked_state(revived(plain(column[:, 0].tolist())), config, VERSION)
                assert torch.equal(kept.view(torch.int64), column.contiguous().view(torch.int64))
            carry_out_captures(state, torch.rand(n, generator=source) < 0.1)


@pytest.mark.parametrize("through", [through_a_file, through_json])
def test_saved_settings_are_those_that_were_given(
    through: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    governor = make(lobotomy_band=(0.9, INF), absolute_threshold=None, warmup_bound=None, rule="any")
    other = make()
    other.load_state_dict(through(governor.state_dict()), keep_config=False)
    assert asdict(other.config) == asdict(governor.config)


def test_a_loaded_count_of_panics_of_any_size_costs_no_time() -> None:
    governor = make()
    saved = governor.state_dict()
    places_of = dict(places())
    saved["state"][places_of["step"]] = 2.0**51
    saved["state"][places_of["consecutive"]] = 2.0**50
    governor.load_state_dict(saved)
    governor.step(1e9)
    assert governor.offending_steps[-1] == 2**51 + 1
    assert len(governor.offending_steps) == 4096


@pytest.mark.parametrize("name", ["snapshot_interval", "sensitivity", "absolute_threshold", "death_penalty"])
def test_a_setting_that_no_float64_holds_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected "):
        GovernorConfig(**{name: 10**400})


ODD: list[Any] = [
    None,
    True,
    "",
    "nan",
    "-inf",
    "x",
    -1,
    0,
    1,
    3,
    21,
    2**53,
    10**400,
    -0.0,
    0.5,
    1e300,
    [],
    {},
    [1],
]


def ways_into(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to each value in lists and dicts."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [way] * bool(way) + [found for key in keys for found in ways_into(value[key], (*way, key))]


@pytest.mark.parametrize(
    "section", ["version", "config", "random_guess_loss", "policy", "state", "magnitudes"]
)
def test_whatever_stands_anywhere_is_taken_whole_or_refused(section: str) -> None:
    saved, source, refused = make(cooldown=2, drift_horizon=4).state_dict(), random.Random(0), 0
    ways = ways_into({section: saved[section]})
    for _ in range(100):
        damaged = copy.deepcopy(saved)
        *above, last = source.choice(ways)
        place: Any = damaged
        for key in above:
            place = place[key]
        place[last] = source.choice(ODD)
        governor = make()
        before = governor.state_dict()
        try:
            governor.load_state_dict(damaged)
        except ValueError:
            assert governor.state_dict() == before
            refused += 1
        else:
            make().load_state_dict(through_json(governor.state_dict()), keep_config=False)
        governor.step(1.0)
        governor.execute_rollback()
    assert refused >= 10
