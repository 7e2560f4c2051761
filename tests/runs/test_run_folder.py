from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch

from tolaria.errors import TolariaError
from tolaria.governor import GovernorEvent, GovernorReport
from tolaria.runs import RunFolder, load_model, plot_run, read_lines, record, run_task, save_model
from tolaria.tasks import create_model
from tolaria.telemetry import events
from tolaria.train import GrowthObserver
from tolaria.train.observers import PhaseRecord, SeedRecord


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = run_task(
        "digits", out=out, steps=120, threads=1, min_gain=-1e9, inject=["nan-loss@30", "spike@70"],
        governor_options={"snapshot_interval": 10},
    )  # fmt: skip
    return result, out


def test_every_step_has_a_line(finished):
    _, out = finished
    steps = [line for line in read_lines(out / "metrics.jsonl") if line["kind"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, 121))
    assert math.isnan(steps[29]["loss"])
    assert steps[-1]["alpha"] in (0.0, 1.0)
    assert {line["phase"] for line in steps} == {"host", "incubate", "blend", "finish"}


def test_lines_are_plain_json(finished):
    _, out = finished
    for name in ("metrics.jsonl", "events.jsonl"):
        for line in (out / name).read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_events_tell_what_was_broken_and_mended(finished):
    result, out = finished
    events = read_lines(out / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "attach"
    assert [e["name"] for e in events if e["kind"] == "fault"] == ["nan-loss@30", "spike@70"]
    reports = [event["report"] for event in events if event["kind"] == "rollback"]
    assert [report["reason"] for report in reports] == ["NON_FINITE", "ANOMALY"]
    assert reports[0]["step"] == 30
    assert result.rollbacks == 2


def test_config_names_everything_a_repetition_needs(finished):
    _, out = finished
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["batch_size"] == 64
    assert config["governor"]["snapshot_interval"] == 10
    assert config["rng_seed"] == 0
    assert config["device"] == "cpu"
    assert config["versions"]["torch"]


def test_same_seed_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        run_task("digits", out=tmp_path / name, steps=20, threads=1, plot=False)
    for file in ("metrics.jsonl", "model.safetensors", "model.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_model_loads_again_with_its_seed(finished):
    result, out = finished
    loaded = load_model(out)
    x = torch.randn(5, 1, 8, 8)
    result.model.eval()
    assert result.outcome == "fossilized"
    assert torch.equal(loaded(x), result.model(x))
    assert not loaded.training


def test_tied_weights_are_saved_once(tmp_path):
    model = create_model("text", rng_seed=1)
    save_model(model, tmp_path, task="text")
    loaded = load_model(tmp_path)
    assert loaded.host.head.weight is loaded.host.embedding.weight
    tokens = torch.randint(0, 20, (2, 8))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_missing_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_unknown_format_is_refused(finished, tmp_path):
    _, out = finished
    (tmp_path / "model.json").write_text('{"format": 99}')
    (tmp_path / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes())
    with pytest.raises(TolariaError, match="expected format 2, got 99"):
        load_model(tmp_path)


def test_picture_is_drawn_from_the_folder_alone(finished, tmp_path):
    _, out = finished
    assert (out / "run.png").stat().st_size > 20_000
    assert plot_run(out, tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"


def test_host_alone_takes_as_many_steps(tmp_path):
    result = run_task("digits", out=tmp_path / "run", steps=40, grow_seed=False, threads=1, plot=False)
    assert result.steps == 40
    assert not result.seeds


def test_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        RunFolder(tmp_path / "file", plot=False)


class Interrupter(GrowthObserver):
    def __init__(self, at: str) -> None:
        self.at = at

    def on_phase_start(self, phase: str, step: int) -> None:
        if phase == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["host", "blend"])
def test_run_interrupted_anywhere_leaves_a_complete_folder(phase, tmp_path):
    result = run_task("digits", out=tmp_path, steps=40, threads=1, observers=[Interrupter(phase)])
    assert result.interrupted
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] is True
    assert (tmp_path / "run.png").exists()
    assert load_model(tmp_path).structure() == result.model.structure()


def test_run_that_nobody_watches_is_drawn_in_spite_of_nan(tmp_path):
    result = run_task("digits", out=tmp_path, steps=40, threads=1, use_governor=False, inject=["nan-loss@1"])
    assert math.isnan(read_lines(tmp_path / "metrics.jsonl")[0]["loss"])
    assert result.rollbacks == 0
    assert (tmp_path / "run.png").exists()


def test_a_module_may_be_called_inf(tmp_path):
    event = {
        "kind": "verdict",
        "tensor_name": "inf",
        "exempt": ["nan"],
        "loss": "inf",
        "thresholds": ["nan", 1],
    }
    (tmp_path / "events.jsonl").write_text(json.dumps(event))
    (read,) = read_lines(tmp_path / "events.jsonl")
    assert (read["tensor_name"], read["exempt"], read["loss"]) == ("inf", ["nan"], math.inf)
    assert math.isnan(read["thresholds"][0])


def test_reader_knows_every_field_that_holds_words():
    classes = [GovernorReport, SeedRecord, PhaseRecord]
    classes += [c for c in vars(events).values() if isinstance(c, type) and issubclass(c, GovernorEvent)]
    words = {f.name for c in classes for f in dataclasses.fields(c) if re.search(r"\bstr\b", str(f.type))}
    assert words <= record._TEXT
