"""The judge's view: the op's own, once more, over what was recorded."""

import json
import math

import numpy as np
import pytest
import torch

from tolaria import GovernorConfig, TolariaGovernor, backend
from tolaria.report.judge import COLUMNS, OfflineJudge, settings_of
from tolaria.report.overview import judge_note
from tolaria.report.reading import RunReading
from tolaria.runs import read_lines, run_task


def read(path):
    run = RunReading(path)
    run.refresh()
    return run


@pytest.mark.parametrize("preset", ["default", "balanced", "strict", "classic"])
def test_every_recorded_verdict_comes_out_the_same(tmp_path, preset):
    out = tmp_path / "run"
    run_task(
        "digits", out=out, steps=260, threads=1, plot=False, preset=preset, grow_seed=False,
        inject=["nan-loss@60", "nan-buffer@95", "spike@130", "lobotomy@180"],
        governor_options={"snapshot_interval": 25},
    )  # fmt: skip
    run = read(out)
    told = [e for e in read_lines(out / "events.jsonl") if e["kind"] == "verdict"]
    assert len(told) >= 4
    assert (run.judge.judged, run.judge.different, run.judge.agreed) == (260, 0, len(told))
    assert "to the bit" in judge_note(run)


def test_a_verdict_that_was_changed_does_not_go_unnoticed(digits, tmp_path):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((digits / name).read_bytes())
    events = [json.loads(line) for line in (digits / "events.jsonl").read_text().splitlines()]
    spike = next(e for e in events if e["kind"] == "verdict" and e["reason"] == "ANOMALY")
    spike["mean"] = math.nextafter(spike["mean"], 1.0)
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    run = read(tmp_path)
    assert run.judge.differed == [spike["step"]]
    assert f"steps {spike['step']:,})" in judge_note(run)


def test_a_loss_that_should_have_been_told_is_one_that_differs(make_run):
    lines = [{"kind": "step", "step": s, "loss": "nan" if s == 20 else 1.0} for s in range(1, 40)]
    run = read(make_run(metrics=lines, config={"governor": {}}))
    assert run.judge.differed == [20]


def test_reference_and_compiled_op_draw_the_same():
    config, rng = GovernorConfig.balanced(), np.random.default_rng(3)
    losses = (1 + 0.1 * rng.normal(size=60)).tolist()
    norms = (1 + 0.1 * rng.normal(size=60)).tolist()
    found = []
    for mode in ("auto", "reference"):
        with backend(mode):
            judge = OfflineJudge(config, 2.3)
            found.append(judge.judge(range(1, 61), losses, norms, [0.1] * 60))
    assert np.array_equal(*found, equal_nan=True)


def test_what_is_drawn_is_what_the_governor_itself_said():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=1000))
    losses = [1 + 0.3 * math.sin(s) for s in range(80)]
    mine = []
    for loss in losses:
        governor.step(loss)
        mine.append(
            [governor.last_verdict.mean, governor.last_verdict.std, *governor.last_verdict.thresholds[1:]]
        )
    drawn = OfflineJudge(GovernorConfig(snapshot_interval=1000), None).judge(
        range(1, 81), losses, [math.nan] * 80, [math.nan] * 80
    )
    names = ("mean", "std", "statistical", "multiplier")
    assert np.array_equal(drawn[[COLUMNS.index(name) for name in names]], np.array(mine).T, equal_nan=True)


def test_settings_come_back_from_json():
    from dataclasses import asdict

    for config in (GovernorConfig(), GovernorConfig.balanced(), GovernorConfig.strict(2.3)):
        written = json.loads(
            json.dumps({k: str(v) if v == math.inf else v for k, v in asdict(config).items()})
        )
        assert settings_of(written) == config
