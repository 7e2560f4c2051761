"""What a page knows of a run: whatever the files are like, whole or growing."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tolaria.report.incidents import tell
from tolaria.report.lines import CHUNK, Tail
from tolaria.report.overview import verdict_of
from tolaria.report.page import data_of
from tolaria.report.reading import RunReading
from tolaria.report.sampling import MinMax, Thinned


def read(path):
    run = RunReading(path)
    run.refresh()
    return run


def steps(numbers, **more):
    return [{"kind": "step", "step": s, "loss": 1 / s, **more} for s in numbers]


def test_a_line_that_grows_is_read_when_it_is_whole(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": ')
    tail = Tail(file)
    assert tail.read() == [{"a": 1}]
    assert tail.read() is None
    assert tail.unread == 6
    with file.open("a") as more:
        more.write("2}\n")
    assert tail.read() == [{"a": 2}]
    assert (tail.unread, tail.damaged) == (0, 0)


@pytest.mark.parametrize(
    "bad", ['{"a":', "1,2", "[]", "null", "\\x00", '{"a": 1}}', "[" * 100_000, '"text"', "{} {}"]
)
def test_a_damaged_line_is_counted_and_passed_over(tmp_path, bad):
    file = tmp_path / "a.jsonl"
    file.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
    tail = Tail(file)
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.damaged == 1


def test_an_endless_line_takes_no_memory(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n' + b"x" * (3 * CHUNK) + b'\n{"a": 2}\n')
    tail, found = Tail(file), []
    while (lines := tail.read()) is not None:
        found += lines
    assert found == [{"a": 1}, {"a": 2}]
    assert tail.damaged == 1


def test_no_spike_is_lost():
    rng = np.random.default_rng(0)
    curve = MinMax(256)
    values = rng.normal(size=100_000)
    spikes = rng.integers(0, 100_000, 5)
    values[spikes] = 1000.0 + np.arange(5)
    for start in range(0, 100_000, 7777):
        part = slice(start, start + 7777)
        curve.add(np.arange(100_000, dtype=float)[part], values[part])
    at, kept = curve.points()
    assert len(at) <= 2 * 256
    assert (np.diff(at) > 0).all()
    assert (values[at.astype(int)] == kept).all()
    assert kept.max() == values.max()
    assert kept.min() == values.min()


def test_points_of_a_short_curve_are_all_there_and_nan_has_a_place():
    curve = MinMax(64)
    curve.add(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, math.nan, math.inf, 2.0]))
    assert [list(each) for each in curve.points()] == [[1.0, 4.0], [1.0, 2.0]]
    assert list(curve.odd_steps()) == [2.0, 3.0]
    assert (curve.count, curve.odd) == (4, 2)


def test_thinned_marks_stay_few_and_are_counted():
    marks = Thinned(100)
    for step in range(10_000):
        marks.add(step, step)
    assert marks.count == 10_000
    assert 50 <= len(marks.kept) <= 100
    assert [step for step, _ in marks.kept] == sorted(step for step, _ in marks.kept)


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "rollback", "step": 3},
        {"kind": "rollback", "step": 3, "report": []},
        {"kind": "rollback", "step": 3, "report": {"restored_step": -1}},
        {"kind": "verdict", "step": "three"},
        {"kind": 7, "step": 3},
        {"step": 3},
        {"kind": "capture", "step": 3},
        {"kind": "promotion", "step": 1e400},
        {"kind": "step", "step": 1.5, "loss": 2.0},
        {"kind": "step", "step": 10**400, "loss": 2.0},
        {"kind": "step", "step": 4},
        {"kind": "validation", "step": None},
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_counted(make_run, event):
    run = read(make_run(metrics=steps(range(1, 4)), events=[event]))
    data_of([run], run.folder)
    assert run.notes()[0] == "1 lines could not be read and were passed over"


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "verdict", "step": 3},
        {"kind": "verdict", "step": 3, "reason": ["x"], "thresholds": "no", "loss": {}, "tensor_name": 5},
        {"kind": "rollback", "step": 3, "report": {"restored_step": 1}},
        {"kind": "validation", "step": 3, "metric": "nan", "bound": None},
        {"kind": "fault", "step": 3},
        {"kind": "seed", "step": 3},
        {"kind": "attach", "step": 0, "state_bytes": "many", "time_s": "inf"},
        {"kind": "resume", "step": 0, "time_s": -5},
        {"kind": "of my own", "step": 2, "x": {}},
    ],
)  # fmt: skip
def test_a_line_that_lacks_fields_is_shown_as_far_as_it_goes(make_run, event):
    run = read(make_run(metrics=steps(range(1, 30)), events=[event], config={"governor": {"window": "x"}}))
    json.dumps(data_of([run], run.folder), allow_nan=False)


@pytest.mark.parametrize(
    "config", [[], 5, {"governor": 5}, {"governor": {"no such": 1}}, {"governor": {"window": -1}},
               {"task": None},
               {"random_guess_loss": "nan", "governor": {}}, {"total_steps": "x", "settings": [1, {}]}],
)  # fmt: skip
@pytest.mark.parametrize("summary", [{}, [], {"test": 3, "host_test": [], "seconds": "inf", "diverged": {}}])
def test_odd_config_and_summary(make_run, config, summary):
    run = read(make_run(metrics=steps(range(1, 30)), config=config, summary=summary))
    json.dumps(data_of([run], run.folder), allow_nan=False)


def test_an_empty_run_is_a_page(make_run):
    run = read(make_run())
    assert verdict_of(run, tell(run)) == ("Nothing is recorded yet.", "none")
    json.dumps(data_of([run], run.folder), allow_nan=False)


@pytest.mark.parametrize("what", ["nothing", "empty folder", "file of another kind"])
def test_what_is_no_run_is_an_error_that_says_so(tmp_path, what):
    path = tmp_path / "x"
    if what == "empty folder":
        path.mkdir()
    elif what == "file of another kind":
        path = tmp_path
    with pytest.raises(ValueError, match="RUN: expected a"):
        RunReading(path)


def test_a_sink_alone_is_enough(tmp_path):
    import torch

    from tolaria import GovernorConfig, TolariaGovernor
    from tolaria.telemetry import JsonLinesSink

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    file = tmp_path / "my events.jsonl"
    with JsonLinesSink(file) as sink:
        config = GovernorConfig(snapshot_interval=5)
        governor = TolariaGovernor(model, optimizer, config=config, sinks=[sink], name="mine")
        for number in range(40):
            governor.step(math.nan if number == 30 else 1.0, tag=f"batch {number}")
    (incident,) = tell(read(file))
    assert incident["outcome"] == "rolled back"
    assert "The loss was NaN at step 31; usual was 1.00" in incident["what"]
    assert ["Tag", "batch 30"] in incident["details"]


def test_ranks_that_tell_the_same_are_told_once(digits, tmp_path):
    for rank in range(3):
        (tmp_path / f"events-{rank}.jsonl").write_bytes((digits / "events.jsonl").read_bytes())
    assert len(tell(read(tmp_path))) == len(tell(read(digits))) == 3


def test_a_clock_that_goes_back_is_told_and_draws_nothing(make_run):
    stamps = [(0, 100.0), (10, 110.0), (20, 50.0), (30, 60.0)]
    run = read(make_run(events=[{"kind": "of mine", "step": s, "time_s": t} for s, t in stamps]))
    assert [list(each) for each in run.log.step_seconds.points()] == [[10, 30], [1.0, 1.0]]
    assert "the clock went back 1 times" in run.notes()[0]


def test_a_run_that_was_killed(tmp_path):
    out = tmp_path / "run"
    code = f"from tolaria.runs import run_task; run_task('digits', out={str(out)!r}, threads=1, plot=False)"
    process = subprocess.Popen([sys.executable, "-c", code])
    file = out / "metrics.jsonl"
    while not (file.exists() and file.stat().st_size > 20_000):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with file.open("a") as cut:
        cut.write('{"kind": "step", "st')
    run = read(out)
    assert "No end is recorded: it is going on, or was killed." in verdict_of(run, tell(run))[0]
    assert run.steps > 100
    assert run.notes() == ["the last line of metrics.jsonl was cut off"]


def test_a_run_that_goes_on_is_read_on_as_if_it_were_read_at_once(digits, tmp_path):
    """Piece by piece the page comes to be what it is of the whole run."""
    folder = tmp_path / digits.name
    folder.mkdir()
    for name in ("config.json", "summary.json"):
        (folder / name).write_bytes((digits / name).read_bytes())
    text = {name: (digits / name).read_bytes() for name in ("metrics.jsonl", "events.jsonl")}
    times = [json.loads(line) for line in text["events.jsonl"].splitlines()]
    for name in text:
        (folder / name).write_bytes(b"")
    run = RunReading(folder)
    lines = text["metrics.jsonl"].splitlines(keepends=True)
    done = 0
    for end in range(37, len(lines) + 37, 37):
        reached = max(json.loads(line).get("step", 0) for line in lines[:end])
        events = [event for event in times if event["step"] <= reached]
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b"".join(lines[done:end]))
        done = end
        run.refresh()
    assert run.judge.different == 0
    assert data_of([run], folder)["runs"][0]["panels"] == data_of([read(digits)], digits)["runs"][0]["panels"]


def test_a_file_that_was_cut_by_a_resume_is_read_anew(make_run):
    folder = make_run(metrics=steps(range(1, 50)))
    run = read(folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps(range(1, 20))))
    run.refresh()
    assert (run.steps, run.last_step) == (19, 19)


def test_memory_does_not_grow_with_the_run(tmp_path):
    """What is kept of a run is no more at its end than in its middle, however much it tells."""
    verdict = {
        "kind": "verdict",
        "reason": "ANOMALY",
        "rollback": False,
        "loss": 9.0,
        "mean": 1.0,
        "std": 0.1,
    }
    metrics, events, run, sizes = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl", None, []
    for start in range(1, 60_001, 5_000):
        numbers = range(start, start + 5_000)
        with metrics.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in steps(numbers, lr=0.1))
        with events.open("a") as file:
            for s in numbers[::10]:
                capture = {"step": s, "capture_id": s, "capture_step": s}
                for event in (
                    {"kind": "capture", **capture},
                    {"kind": "promotion", **capture},
                    {**verdict, "step": s},
                ):
                    file.write(json.dumps(event) + "\n")
        run = run or RunReading(tmp_path, buckets=512)
        run.refresh()
        kept = (
            run.log,
            run.loss,
            run.smooth,
            run.curves,
            run.judged,
            run.bands,
            run.validations,
            run.aftermath,
        )
        sizes.append(len(pickle.dumps(kept)))
    assert run.steps == 60_000
    assert run.log.dropped == 4_000
    assert sizes[-1] < 1.02 * sizes[5]
