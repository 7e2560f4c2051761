"""``TolariaCallback`` in Transformers' ``Trainer``: options, clean runs, logs, arguments."""

from __future__ import annotations

from pathlib import Path

import pytest
from faulty_runs import NAN_FAULTS, Fault
from trainers import need, poisoned_files, same

need("transformers")

from transformers_runs import CONFIG, Run, bare, governed, is_sane, language_model, sentences  # noqa: E402

from tolaria.integrations.transformers import TolariaCallback  # noqa: E402


@pytest.mark.parametrize("filters", [True, False], ids=["filter", "no filter"])
def test_a_nan_is_in_no_logged_mean(filters: bool, tmp_path: Path) -> None:
    run = governed(
        tmp_path, Fault("loss", at=33), max_steps=50, logging_steps=1, logging_nan_inf_filter=filters
    )
    assert is_sane(run.losses)
    assert len(run.losses) == 49
    logged = [entry["step"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert 33 not in logged


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 3, "max_steps": 30}, {"logging_nan_inf_filter": False},
    {"optim": "adafactor"}, {"max_grad_norm": 0.0},
    {"lr_scheduler_type": "cosine", "warmup_steps": 5}, {"max_steps": -1, "num_train_epochs": 2},
    {"label_smoothing_factor": 0.1, "model": language_model, "data": sentences()},
    {"gradient_checkpointing": True, "model": language_model, "data": sentences()},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_a_clean_governed_run_is_the_bare_one(options: dict, tmp_path: Path) -> None:
    options = {"max_steps": 45, **options}
    run = governed(tmp_path / "governed", **options)
    other = bare(tmp_path / "bare", **options)
    assert same(run.state(), other.state())
    assert run.callback.governor.rollback_count == 0
    assert run.callback.governor.step_count == run.trainer.state.global_step
    assert run.trainer.state.log_history[0].keys() == other.trainer.state.log_history[0].keys()


@pytest.mark.parametrize("name", NAN_FAULTS)
@pytest.mark.parametrize("options", [
    {"gradient_accumulation_steps": 2}, {"optim": "adafactor"},
    {"save_only_model": True, "logging_nan_inf_filter": False},
], ids=lambda options: "-".join(options))  # fmt: skip
def test_nan_in_other_runs(name: str, options: dict, tmp_path: Path) -> None:
    run = governed(tmp_path, Fault(name, at=20), max_steps=25, save_steps=10, **options)
    assert run.trainer.state.global_step == 25
    assert not poisoned_files(
        tmp_path, "model.safetensors", *([] if "save_only_model" in options else ["optimizer.pt"])
    )
    assert run.callback.governor.rollback_count == 1
    assert run.records.recorder.exact == [True]
    assert is_sane(run.losses)


def test_the_judged_loss_is_the_logged_one(tmp_path: Path) -> None:
    run = governed(tmp_path, gradient_accumulation_steps=3, logging_steps=1, max_steps=15)
    assert run.callback.governor.history == pytest.approx(run.losses[-15:], rel=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="config"):
        TolariaCallback("balanced")
    with pytest.raises(ValueError, match="on_save"):
        TolariaCallback(on_save="never")
    with pytest.raises(TypeError, match="trainer"):
        TolariaCallback().install(object())


def test_it_must_be_installed_once(tmp_path: Path) -> None:
    callback = TolariaCallback(CONFIG)
    with pytest.raises(RuntimeError, match="install"):
        Run(tmp_path, Fault("none"), None, kind=_handed_over(callback))
    run = governed(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="TolariaCallback"):
        TolariaCallback(CONFIG).install(run.trainer)


def _handed_over(callback: TolariaCallback):
    from transformers_runs import FaultyTrainer

    def make(callbacks, **options):
        return FaultyTrainer(callbacks=[*callbacks, callback], **options)

    return make
