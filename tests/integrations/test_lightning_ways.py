"""What people do in Lightning: by hand, in parts, in half precision, with averages, resumed."""

from __future__ import annotations

import importlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from trainers import need, same

pl = need("lightning.pytorch")

from integrations import lightning_runs as runs  # noqa: E402  (behind the look for what it needs)
from integrations.lightning_fit import config, fit, poisoned  # noqa: E402

from tolaria.governor import PanicReason, RollbackEvent  # noqa: E402
from tolaria.integrations.lightning import TolariaCallback  # noqa: E402

PACKAGE = "lightning.pytorch"


def reports(events: list[Any]) -> list[Any]:
    return [event.report for event in events if isinstance(event, RollbackEvent)]


@pytest.mark.parametrize("returns_loss", [True, False])
@pytest.mark.parametrize("fault", ["gradient", "moment", "loss"])
def test_manual_optimization_of_several_optimizers(fault: str, returns_loss: bool, tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault=fault, manual=True, returns_loss=returns_loss)
    events: list[Any] = []
    callback = TolariaCallback(config(), sinks=[events.append])
    trainer = fit(PACKAGE, tmp_path, module, callback)
    assert trainer.global_step == 2 * runs.STEPS_AN_EPOCH * runs.EPOCHS  # Lightning counts both
    assert callback.governor.step_count == runs.STEPS_AN_EPOCH * runs.EPOCHS
    (report,) = reports(events)
    assert report.tag in (2 * runs.AT, 2 * runs.AT + 2)
    assert poisoned(tmp_path) == []
    assert all(t.isfinite().all() for t in runs.state_of(trainer, module))


def test_the_mean_of_a_short_last_window_is_the_mean(tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE)
    losses: list[float] = []
    inner = module.training_step

    def told(batch: Any, batch_idx: int) -> Any:
        loss = inner(batch, batch_idx)
        losses.append(loss.item())
        return loss

    module.training_step = told
    callback = TolariaCallback(config(window=20))
    fit(PACKAGE, tmp_path, module, callback, accumulate_grad_batches=5, epochs=2, checkpoints=False)
    windows = [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 16)]
    windows += [slice(w.start + 16, w.stop + 16) for w in windows]
    means = [sum(losses[w]) / len(losses[w]) for w in windows]
    assert callback.governor.history == pytest.approx(means, rel=1e-6)


def test_a_step_without_a_loss_is_no_step(tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE)
    inner = module.training_step
    module.training_step = lambda batch, batch_idx: None if batch_idx % 2 else inner(batch, batch_idx)
    callback = TolariaCallback(config())
    fit(PACKAGE, tmp_path, module, callback, epochs=1, checkpoints=False)
    assert callback.governor.step_count == runs.STEPS_AN_EPOCH // 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str, tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault="gradient")
    callback = TolariaCallback(config())
    trainer = fit(PACKAGE, tmp_path, module, callback, precision=precision, epochs=3)
    assert callback.governor.rollback_count == 1
    assert poisoned(tmp_path) == []
    assert all(t.isfinite().all() for t in runs.state_of(trainer, module))


def test_an_overflow_under_a_scaler_is_routine_and_a_loss_that_is_none_is_not(tmp_path: Path) -> None:
    plugins = importlib.import_module("lightning.pytorch.plugins")
    ends = []
    for name, governed, fault in (("bare", False, ""), ("clean", True, ""), ("loss", True, "loss")):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=20)
        plugin = plugins.MixedPrecision("16-mixed", "cpu", scaler)
        module = runs.make_module(PACKAGE, fault=fault)
        events: list[Any] = []
        callback = TolariaCallback(config(), sinks=[events.append]) if governed else None
        trainer = fit(PACKAGE, tmp_path / name, module, callback, plugins=[plugin], epochs=3)
        ends.append((runs.state_of(trainer, module), scaler.get_scale()))
        assert trainer.global_step == runs.STEPS_AN_EPOCH * 3
        assert len(reports(events)) == (1 if fault else 0)
        assert poisoned(tmp_path / name) == []
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("fault", ["gradient", "weight", "loss"])
def test_an_average_is_covered(fault: str, is_first: bool, tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault=fault)
    average = pl.callbacks.EMAWeightAveraging(decay=0.9)
    callback = TolariaCallback(config())
    others = (callback, average) if is_first else (average, callback)
    trainer = fit(PACKAGE, tmp_path, module, None, *others)
    assert callback.governor.rollback_count == 1
    assert all(t.isfinite().all() for t in module.state_dict().values())
    assert same(list(module.parameters()), list(average._average_model.module.parameters()))
    assert poisoned(tmp_path) == []
    assert trainer.callback_metrics["val_loss"] < 1.0


def test_a_run_that_is_resumed_at_an_epochs_end_is_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    class OfEpoch:
        """Draws each epoch's order from its number, so that a resumed run meets the same batches."""

        def __init__(self) -> None:
            self.epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 8 * runs.STEPS_AN_EPOCH

        def __iter__(self) -> Any:
            return iter(
                torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
            )

    def data() -> Any:
        train, validation = runs.loaders()
        return DataLoader(train.dataset, batch_size=8, sampler=OfEpoch()), validation

    ends = []
    for name, stops in (("whole", ()), ("parts", (2,))):
        saved = None
        for part, last in enumerate((*stops, runs.EPOCHS)):
            module = runs.make_module(PACKAGE, schedule="step", fault="gradient", at=0 if saved else 20)
            callback = TolariaCallback(config())
            folder = tmp_path / name / str(part)
            trainer = fit(PACKAGE, folder, module, callback, ckpt_path=saved, epochs=last, data=data())
            saved = folder / "every" / "last.ckpt"
        form = callback.state_dict()
        ends.append((runs.state_of(trainer, module), form))
        assert json.loads(json.dumps(form, allow_nan=False)) == form
        assert trainer.global_step == runs.STEPS_AN_EPOCH * runs.EPOCHS
    assert same(ends[0][0], ends[1][0])
    assert callback.governor.step_count == runs.STEPS_AN_EPOCH * runs.EPOCHS
    assert callback.governor.rollback_count == 1  # of the first part
    assert callback.governor.lifetime["count"] == runs.STEPS_AN_EPOCH * runs.EPOCHS - 1  # all but the bad one


@pytest.mark.parametrize("at", [20, 31])
def test_batches_are_left_out_but_the_epoch_ends_as_ever(at: int, tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault="loss", at=at)
    validated: list[int] = []
    module.on_validation_epoch_end = lambda: validated.append(module.trainer.global_step)
    callback = TolariaCallback(config(skip_batches=4))
    trainer = fit(PACKAGE, tmp_path, module, callback, checkpoints=False, num_sanity_val_steps=0)
    assert callback.governor.batches_left_out == 4
    assert trainer.global_step == runs.STEPS_AN_EPOCH * runs.EPOCHS - 4
    assert len(validated) == runs.EPOCHS


def test_batches_of_a_stream_are_left_out(tmp_path: Path) -> None:
    train, validation = runs.loaders()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([train.dataset[i] for i in range(128)])

    for at in (4, 14):
        module = runs.make_module(PACKAGE, fault="loss", at=at)
        validated: list[int] = []
        module.on_validation_epoch_end = lambda told=validated: told.append(1)
        callback = TolariaCallback(config(skip_batches=4))
        data = DataLoader(Stream(), batch_size=8), validation
        fit(
            PACKAGE, tmp_path / str(at), module, callback,
            checkpoints=False, num_sanity_val_steps=0, epochs=3, data=data,
        )  # fmt: skip
        assert callback.governor.batches_left_out == 4
        assert len(validated) == 3


def test_what_was_found_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tolaria.integrations"):
        module = runs.make_module(PACKAGE, schedule="step")
        fit(PACKAGE, tmp_path, module, TolariaCallback(), checkpoints=False, epochs=1)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "tolaria.integrations"]
    assert line == (
        "tolaria in Lightning: optimizers AdamW, schedulers OneCycleLR, scaler none, averages none, "
        "classes 3, ranks 1, loggers CSVLogger"
    )


def test_ranks_go_back_together(tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault="gradient")
    inner = module.on_after_backward
    module.on_after_backward = lambda: inner() if module.trainer.global_rank == 1 else None
    callback = TolariaCallback(config())
    fit(PACKAGE, tmp_path, module, callback, strategy="ddp_fork", devices=2)  # in processes of their own
    assert poisoned(tmp_path) == []
    newest = torch.load(tmp_path / "every/last.ckpt", weights_only=False)
    assert newest["global_step"] == runs.STEPS_AN_EPOCH // 2 * runs.EPOCHS
    (report,) = newest["callbacks"]["TolariaCallback"]["policy"]["reports"]
    assert report["tag"] == runs.AT
    assert report["reason"] == PanicReason.GRADIENT_NORM


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="config: expected GovernorConfig or None, got str"):
        TolariaCallback("balanced")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="config: expected skip_anomalous_steps=False, got True"):
        TolariaCallback(config(skip_anomalous_steps=True))
    with pytest.raises(ValueError, match="on_save: expected 'verify' or 'trust', got 'never'"):
        TolariaCallback(on_save="never")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedules: expected 'keep' or 'rewind', got 'hold'"):
        TolariaCallback(schedules="hold")  # type: ignore[arg-type]


def test_metrics_of_torchmetrics_are_freed(tmp_path: Path) -> None:
    torchmetrics = need("torchmetrics")
    module = runs.make_module(PACKAGE, fault="loss", quiet=True)
    module.mean = torchmetrics.MeanMetric(nan_strategy="disable")
    inner = module.training_step

    def told(batch: Any, batch_idx: int) -> Any:
        loss = inner(batch, batch_idx)
        module.mean(loss.detach())
        module.log("mean_loss", module.mean, on_step=False, on_epoch=True)
        return loss

    module.training_step = told
    trainer = fit(PACKAGE, tmp_path, module, TolariaCallback(config()), checkpoints=False, epochs=3)
    assert math.isfinite(trainer.callback_metrics["mean_loss"])


def test_the_mean_of_the_epoch_lacks_the_bad_batch_alone(tmp_path: Path) -> None:
    module = runs.make_module(PACKAGE, fault="loss")
    losses: list[float] = []
    inner = module.training_step

    def told(batch: Any, batch_idx: int) -> Any:
        loss = inner(batch, batch_idx)
        losses.append(loss.item())
        return loss

    module.training_step = told
    trainer = fit(PACKAGE, tmp_path, module, TolariaCallback(config()), checkpoints=False, epochs=2)
    good = [loss for loss in losses[runs.STEPS_AN_EPOCH :] if math.isfinite(loss)]
    assert len(good) == runs.STEPS_AN_EPOCH - 1
    assert float(trainer.callback_metrics["train_loss_epoch"]) == pytest.approx(sum(good) / len(good))
