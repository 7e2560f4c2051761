"""``TolariaCallback`` in Lightning's trainer, of both packages."""

from __future__ import annotations

import csv
import importlib
import math
from pathlib import Path
from typing import Any

import pytest
from trainers import need, same

need("lightning.pytorch")
need("pytorch_lightning")

from integrations import lightning_runs as runs  # noqa: E402  (behind the look for what it needs)
from integrations.lightning_fit import config, fit, poisoned  # noqa: E402

from tolaria.governor import RollbackEvent  # noqa: E402
from tolaria.integrations.lightning import TolariaCallback  # noqa: E402

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.mark.parametrize(
    ("package", "fault"),
    [*((PACKAGES[0], fault) for fault in runs.FAULTS), (PACKAGES[1], "gradient"), (PACKAGES[1], "moment")],
)
def test_a_broken_run_survives_and_saves_nothing_poisoned(package: str, fault: str, tmp_path: Path) -> None:
    pl = importlib.import_module(package)
    recorder = runs.recorder(package)
    trainers: list[Any] = []
    restored: list[bool] = []

    class Note(pl.Callback):  # type: ignore[misc, name-defined]
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            trainers.append(trainer)

    def check(event: Any) -> None:
        if isinstance(event, RollbackEvent):
            now = runs.state_of(trainers[0], module)
            restored.append(same(now, recorder.states[event.report.restored_step]))

    callback = TolariaCallback(config(), sinks=[check])
    module = runs.make_module(package, fault=fault)
    stopping = pl.callbacks.EarlyStopping("train_loss", patience=100, check_finite=True)
    trainer = fit(package, tmp_path, module, callback, recorder, Note(), stopping)
    assert trainer.global_step == runs.STEPS_AN_EPOCH * runs.EPOCHS
    assert poisoned(tmp_path) == []
    assert all(t.isfinite().all() for t in runs.state_of(trainer, module))
    assert all(math.isfinite(float(v)) for v in trainer.callback_metrics.values())
    assert all(restored)
    assert callback.governor is not None
    assert callback.governor.rollback_count == len(restored)
    if fault not in ("spike", "collapse"):  # these are left alone: they recover, the former slowly
        assert restored
    if fault != "spike":
        assert trainer.callback_metrics["val_loss"] < 1.0  # guessing: 1.1
    rows = list(csv.DictReader((tmp_path / "log/version_0/metrics.csv").read_text().splitlines()))
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps)
    assert max(steps) == runs.STEPS_AN_EPOCH * runs.EPOCHS - 1
    for name in ("train_loss_step", "train_loss_epoch", "val_loss"):
        assert all(math.isfinite(float(row[name])) for row in rows if row[name])


@pytest.mark.parametrize(
    ("package", "schedule"),
    [*((PACKAGES[0], schedule) for schedule in ("", "step", "epoch", "plateau")), (PACKAGES[1], "step")],
)
def test_a_clean_run_is_the_bare_one_bit_for_bit(package: str, schedule: str, tmp_path: Path) -> None:
    ends = []
    for governed in (False, True):
        module = runs.make_module(package, schedule=schedule)
        callback = TolariaCallback(config()) if governed else None
        folder = tmp_path / str(governed)
        trainer = fit(package, folder, module, callback, accumulate_grad_batches=3, gradient_clip_val=0.5)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*.ckpt"))
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        ends.append((runs.state_of(trainer, module), rates, files, trainer.callback_metrics))
        if callback:
            assert callback.governor is not None
            assert callback.governor.step_count == trainer.global_step == 6 * runs.EPOCHS
            assert callback.governor.random_guess_loss == math.log(3)
            assert callback.governor.rollback_count == 0
            assert "save_checkpoint" not in vars(trainer)
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1:3] == ends[1][1:3]
    assert same(dict(ends[0][3]), dict(ends[1][3]))
