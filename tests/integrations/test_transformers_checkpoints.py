"""``TolariaCallback`` and what Transformers' ``Trainer`` writes: limits, resuming, evaluations, batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from faulty_runs import Fault
from trainers import need, poisoned_files, same

need("transformers")

from transformers_runs import CONFIG, Run, bare, governed, transformers  # noqa: E402

from tolaria.integrations.transformers import TolariaCallback  # noqa: E402

STEP_BY_STEP = {"max_steps": 30, "save_steps": 1, "logging_steps": 1}


@pytest.mark.parametrize("name", ["weight", "moment", "gradient"])
def test_nothing_poisoned_is_written_even_at_each_step(name: str, tmp_path: Path) -> None:
    governed(tmp_path, Fault(name, at=12), **STEP_BY_STEP)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 30
    assert not poisoned_files(tmp_path, "model.safetensors", "optimizer.pt")


def test_the_limit_leaves_the_last_healthy_checkpoint(tmp_path: Path) -> None:
    config = CONFIG.replace(snapshot_interval=4, probation=2)
    left: list[tuple[set[int], int]] = []

    class Looks(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            there = {int(path.name.rpartition("-")[2]) for path in tmp_path.glob("checkpoint-*")}
            left.append((there, callback.governor.last_good_step))
            if state.global_step == 15:
                callback.governor.execute_rollback()

    callback = TolariaCallback(config)
    options = {**STEP_BY_STEP, "save_total_limit": 1, "kind": _with(Looks())}
    Run(tmp_path, Fault("none"), callback, **options)
    healthy = set()
    for step, (there, good) in enumerate(left, start=1):
        assert step in there
        assert len(there) <= 3
        if good >= 4:
            assert min(there) <= good
            healthy.add(min(there))
    assert len(healthy) >= 3  # and an old one makes place
    assert not {13, 14, 15} & left[15][0]  # undone after 15
    assert callback._trainer.args.save_total_limit == 1
    assert (
        torch.load(tmp_path / "checkpoint-30" / "training_args.bin", weights_only=False).save_total_limit == 1
    )


def _with(*more):
    from transformers_runs import FaultyTrainer

    def make(callbacks, **options):
        return FaultyTrainer(callbacks=[*callbacks, *more], **options)

    return make


def test_a_limit_that_leaves_room_is_the_trainers_own(tmp_path: Path) -> None:
    governed(tmp_path, max_steps=90, save_steps=30, save_total_limit=2)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-60", "checkpoint-90"}


@pytest.mark.parametrize("restores", [False, True], ids=["callbacks as given", "callbacks restored"])
def test_resuming_goes_on_bit_for_bit(restores: bool, tmp_path: Path) -> None:
    whole = governed(tmp_path / "whole", max_steps=40)
    half = tmp_path / "whole" / "checkpoint-20"
    again = governed(
        tmp_path / "again", max_steps=40, resume=str(half), restore_callback_states_from_checkpoint=restores
    )
    assert same(again.state()[:3], whole.state()[:3])
    assert again.callback.governor.step_count == 40
    assert again.callback.governor.history == whole.callback.governor.history
    assert again.callback._trainer.callback_handler.callbacks[0] is again.callback


def test_a_bare_checkpoint_resumes_governed_and_back(tmp_path: Path) -> None:
    other = bare(tmp_path / "bare", max_steps=40)
    run = governed(tmp_path / "governed", max_steps=40, resume=str(tmp_path / "bare" / "checkpoint-20"))
    assert same(run.state()[:3], other.state()[:3])
    assert run.callback.governor.step_count == 20
    back = bare(tmp_path / "back", max_steps=60, resume=str(tmp_path / "governed" / "checkpoint-40"))
    assert back.trainer.state.global_step == 60


def test_early_stopping_lives_on(tmp_path: Path) -> None:
    class Stops(transformers.EarlyStoppingCallback):
        def __init__(self):
            super().__init__(early_stopping_patience=1)

    run = Run(
        tmp_path, Fault("weight", at=20), TolariaCallback(CONFIG), max_steps=40, eval_strategy="steps",
        eval_steps=20, metric_for_best_model="eval_loss", load_best_model_at_end=True, kind=_with(Stops()),
    )  # fmt: skip
    evaluations = [e["eval_loss"] for e in run.trainer.state.log_history if "eval_loss" in e]
    assert run.trainer.state.global_step == 40
    assert all(loss == loss for loss in evaluations)
    assert run.callback.governor.rollback_count == 1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_batches_are_left_out_after_a_rollback(accumulation: int, tmp_path: Path) -> None:
    config = CONFIG.replace(skip_batches=5)
    run = governed(
        tmp_path, Fault("loss", at=4), config=config, max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    per_epoch, lost = {1: (32, 5), 4: (8, 2)}[accumulation]
    assert run.callback.governor.batches_left_out == 5
    assert run.trainer.state.global_step == 2 * per_epoch - lost
    assert run.callback.governor.step_count == run.trainer.state.global_step


def test_a_model_saved_by_hand_is_verified(tmp_path: Path) -> None:
    class Saves(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 20:
                run["trainer"].save_model(str(tmp_path / "by hand"))

    def make(**options):
        run["trainer"] = _with(Saves())(**options)
        return run["trainer"]

    run: dict = {}
    Run(tmp_path / "run", Fault("weight", at=20), TolariaCallback(CONFIG), max_steps=25, kind=make)
    assert not poisoned_files(tmp_path / "by hand", "model.safetensors")
