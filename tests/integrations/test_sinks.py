"""Sinks of trackers: the same numbers everywhere, alerts, the trainer's step, nothing dropped."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trainers import need

from tolaria import GovernorConfig, TolariaGovernor
from tolaria.integrations import CsvSink, TrackioSink, WandbSink
from tolaria.telemetry.loggers import _TrackerSink


def run(sink: Any, *, each_step: Any = lambda step: None) -> None:
    model = nn.Linear(2, 2)
    config = GovernorConfig(snapshot_interval=4, probation=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TolariaGovernor(model, optimizer, config=config, sinks=[sink]) as governor:
        for step in range(101, 111):
            governor.step(math.nan if step == 108 else 1.0, tag=step)
            each_step(step)


EXPECTED = [
    (104, "governor/capture", 2.0),
    (105, "governor/last_known_good_step", 4.0),
    (108, "governor/panic_reason", 1.0),
    (108, "governor/rollbacks", 1.0),
    (108, "governor/steps_lost", 4.0),
]


def test_a_table_gets_them(tmp_path: Path) -> None:
    for _ in range(2):
        with CsvSink(tmp_path / "events.csv") as sink:
            run(sink)
    rows = list(csv.DictReader((tmp_path / "events.csv").read_text().splitlines()))
    assert [(int(r["step"]), r["name"], float(r["value"])) for r in rows] == 2 * EXPECTED


def test_trackio_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = need("trackio")
    live = trackio.init(project="p", embed=False, auto_log_gpu=False, auto_log_cpu=False)
    told: list[tuple[Any, ...]] = []
    alerts: list[str] = []
    log, alert = live.log, live.alert
    monkeypatch.setattr(live, "log", lambda metrics, step: (told.append((step, metrics)), log(metrics, step)))
    monkeypatch.setattr(
        live, "alert", lambda title, text: (alerts.append(text), alert(title=title, text=text))
    )
    run(TrackioSink(live), each_step=lambda step: trackio.log({"loss": 1.0}, step=step))
    trackio.finish()
    governor = [(step, name, value) for step, m in told for name, value in m.items() if name != "loss"]
    assert governor == EXPECTED
    assert alerts == [
        "step 108: the governor rolled back (non finite; loss nan) to the state of 4 steps before; rollback 1"
    ]


def test_wandb_gets_them_offline_and_drops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = need("wandb")
    live = wandb.init(project="p", dir=tmp_path)
    run(WandbSink(), each_step=lambda step: wandb.log({"loss": float(step)}, step=step))
    folder = Path(live.dir).parent
    live.finish()
    rows = history(folder)
    assert [row["loss"] for row in rows if "loss" in row] == [float(step) for step in range(101, 111)]
    found = [
        (int(row["governor/step"]), name, float(value))
        for row in rows
        for name, value in row.items()
        if name.startswith("governor/") and name != "governor/step"
    ]
    assert sorted(found) == sorted(EXPECTED)


def history(folder: Path) -> list[dict[str, float]]:
    """The rows that an offline run has written."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    rows = []
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind W&B's head of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_without_a_run_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    need("wandb")
    run(WandbSink())
    assert "WandbSink: expected an active run, got none; call wandb.init(), or pass run=" in caplog.text


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Told(_TrackerSink):
        def _write(self, scalars: Any, step: int) -> None:
            told.append(step)

        def _alert(self, text: str) -> None:
            told.append(text)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    sink = Told()
    from tolaria.governor import CaptureEvent

    sink(CaptureEvent(step=1, capture_id=2, capture_step=1, bytes=3))
    assert told == []
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    sink(CaptureEvent(step=1, capture_id=2, capture_step=1, bytes=3))
    assert told == [1]
