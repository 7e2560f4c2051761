from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from tolaria.runs import plot_run
from tolaria.runs.plot import Incident, find_incidents, free_corner, place
from tolaria.runs.record import RunRecord


def record(losses, **events) -> RunRecord:
    steps = np.arange(1, len(losses) + 1, dtype=np.float64)
    return RunRecord(steps, np.array(losses), np.zeros_like(steps), ["DORMANT"] * len(losses), events=events)


def rollback(step: int, back: int, reason: str = "NON_FINITE") -> dict:
    return {"report": {"step": step, "restored_step": back, "steps_lost": step - back, "reason": reason}}


def fault(step: int, kind: str) -> dict:
    return {"step": step, "name": f"{kind}@{step}"}


def test_fault_its_anomaly_and_its_rollback_are_one_incident():
    run = record(
        [1.0] * 100,
        fault=[fault(40, "spike")],
        verdict=[{"step": 40, "rollback": False}, {"step": 41, "rollback": True}],
        rollback=[rollback(41, 30, "ANOMALY")],
    )
    (incident,) = find_incidents(run)
    assert incident.text == "spike injected → anomaly: back to 30, 11 steps lost"
    assert (incident.first, incident.last, incident.anomalies) == (30.0, 41.0, [40.0])


def test_fault_found_by_a_later_capture_is_told_with_its_rollback():
    run = record([1.0] * 100, fault=[fault(35, "nan-buffer")], rollback=[rollback(50, 30)])
    assert [i.text for i in find_incidents(run)] == [
        "nan-buffer injected → non finite: back to 30, 20 steps lost"
    ]


def test_fault_before_the_restored_state_is_not_blamed():
    run = record([1.0] * 100, fault=[fault(10, "lobotomy")], rollback=[rollback(50, 49)])
    assert [i.text for i in find_incidents(run)] == [
        "lobotomy injected → unnoticed", "non finite: back to 49, 1 step lost",
    ]  # fmt: skip


def test_anomalies_in_a_row_share_a_label():
    run = record([1.0] * 100, verdict=[{"step": s, "rollback": False} for s in (20, 60)])
    assert [i.text for i in find_incidents(run)] == ["2 anomalies sat through"]


def test_labels_in_one_row_do_not_touch():
    incidents = [
        Incident(s - 10, s, "nan-loss injected → non finite: back", [s], []) for s in range(20, 1000, 40)
    ]
    place(incidents, 1000.0)
    length = len(incidents[0].text) * 0.0058 * 1000
    for row in {i.row for i in incidents}:
        spans = [
            (i.first, i.last + length) if i.last + length < 1000 else (i.first - length, i.last)
            for i in incidents if i.row == row
        ]  # fmt: skip
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_smooth_line_ignores_a_spike_and_follows_a_run_that_has_left_for_good():
    assert record([1.0] * 50 + [1e6] + [1.0] * 50).smoothed()[60] == pytest.approx(1.0)
    assert record([1.0] * 50 + [1e6] * 50).smoothed()[-1] == pytest.approx(1e6)
    assert math.isnan(record([1.0, math.nan, 1.0]).smoothed()[1])


@pytest.mark.parametrize("steps", [0, 1, 400])
def test_run_of_any_length_is_drawn(steps, tmp_path):
    """A folder written by hand, with more incidents than there is room for."""
    lines = [
        {"kind": "step", "step": s, "stage": "DORMANT", "loss": "nan" if s % 7 == 0 else 1 / s, "alpha": 0}
        for s in range(1, steps + 1)
    ]  # fmt: skip
    events = [{"kind": "fault", **fault(s, "nan-loss")} for s in range(2, steps + 1, max(1, steps // 40))] + [
        {"kind": "rollback", **rollback(s, s - 1)} for s in range(2, steps + 1, max(1, steps // 40))
    ]
    for name, written in (("metrics.jsonl", lines), ("events.jsonl", events)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in written))
    config = {"task": "digits", "slot": "s", "governor": {}, "settings": {}, "random_guess_loss": 2.3}
    summary = {
        "outcome": "none", "rollbacks": 1, "interrupted": True, "diverged": None, "steps": steps,
        "seconds": 1.0, "host_parameters": 10, "seed_parameters": 0, "phases": [], "host_test": None,
        "test": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert plot_run(tmp_path).stat().st_size > 10_000


def test_validations_that_a_rollback_took_back_are_not_drawn_as_kept():
    run = record([1.0] * 60, rollback=[rollback(50, 30)])
    run.validations = [{"step": s} for s in (20, 30, 31, 40, 49, 50, 60)]
    assert run.undone_validations.tolist() == [False, False, True, True, True, False, False]


def test_capture_that_waits_when_the_run_ends_is_not_discarded():
    def captures(*steps):
        return [{"kind": "capture", "step": s, "capture_step": s} for s in steps]

    promoted = [{"capture_step": 10}]
    waiting = record([1.0] * 40, capture=captures(10, 20, 30), promotion=promoted).captures()
    assert waiting == {"known good": [10], "discarded": [20], "on probation at the end": [30]}
    anomaly = [{"step": 35, "rollback": False}]
    judged = record([1.0] * 40, capture=captures(10, 30), promotion=promoted, verdict=anomaly).captures()
    assert judged["discarded"] == [30]
    back = record([1.0] * 40, capture=captures(10, 30), promotion=promoted, rollback=[]).captures()
    assert back["on probation at the end"] == [30]


@pytest.mark.parametrize(("name", "head"), [("a.svg", b"<?xml"), ("b", b"\x89PNG"), ("c.pdf", b"%PDF")])
def test_suffix_chooses_the_format(tmp_path, name, head):
    test_run_of_any_length_is_drawn(3, tmp_path)
    assert plot_run(tmp_path, tmp_path / name).read_bytes().startswith(head)


@pytest.mark.parametrize(("line", "up"), [(97.0, True), (98.2, False)])
def test_label_of_a_test_stays_clear_of_the_line(line, up):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axis = figure.subplots()
    axis.set_ylim(90, 100)
    text, where = "test, at the end: 97.60%", ([0.0, 2500.0], [line, line])
    assert (free_corner(axis, 2500.0, (1000.0, 97.6), text, where)[1] > 0) == up
    assert free_corner(axis, 2500.0, (2500.0, 97.6), text, where)[0] == -1  # there is no room to the right
