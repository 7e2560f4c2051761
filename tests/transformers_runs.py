"""Runs of Transformers' ``Trainer`` on tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from faulty_runs import Fault, Net, Recorder, points
from trainers import need

transformers = need("transformers")
need("accelerate")

from tolaria import GovernorConfig  # noqa: E402  (the packages may be absent)
from tolaria.integrations.transformers import TolariaCallback  # noqa: E402

CONFIG = GovernorConfig.balanced(snapshot_interval=21)
VOCABULARY = 24


class FaultyTrainer(transformers.Trainer):
    """Overrides ``compute_loss``, as people do."""

    fault = Fault("none")

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        step = self.state.global_step + 1
        if "x" in inputs:
            inputs = {**inputs, "x": self.fault.batch(inputs["x"], step)}
        loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
        assert not return_outputs
        return self.fault.loss(loss, step)


class Strikes(transformers.TrainerCallback):
    """Faults in what the optimizer reads and writes."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.fault.before_step(model, optimizer, state.global_step + 1)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.fault.after_step(model, optimizer, state.global_step + 1)


class Records(transformers.TrainerCallback):
    """Keeps each state; it stands behind the governor."""

    def __init__(self, tolaria: TolariaCallback | None) -> None:
        self.tolaria, self.recorder = tolaria, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.tolaria is not None:
            self.recorder = Recorder(model, optimizer)

    def on_step_end(self, args, state, control, **kwargs):
        if self.recorder is not None:
            self.recorder.record(self.tolaria.governor)

    on_save = on_step_end


def arguments(folder: Path, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder), "max_steps": 140, "per_device_train_batch_size": 16,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_steps": 20, "logging_steps": 5,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**defaults, **options})


class Run:
    """A trainer, governed or bare, that has trained."""

    def __init__(
        self, folder: Path, fault: Fault, callback: TolariaCallback | None, *, model: Any = None,
        data: Any = None, kind: Any = FaultyTrainer, resume: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        model = Net() if model is None else model()
        data = points() if data is None else data
        self.trainer = kind(
            model=model, args=arguments(folder, **options), train_dataset=data,
            eval_dataset=data[:32], callbacks=[Strikes(fault)],
        )  # fmt: skip
        self.trainer.fault = fault
        self.callback = callback
        if callback is not None:
            callback.install(self.trainer)
        self.records = Records(callback)
        self.trainer.add_callback(self.records)
        self.result = self.trainer.train(resume_from_checkpoint=resume)

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def state(self) -> list[Any]:
        trainer = self.trainer
        return [
            trainer.model.state_dict(), trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict(),
            self.losses, torch.get_rng_state(),
        ]  # fmt: skip

    def evaluation(self) -> float:
        return float(self.trainer.evaluate()["eval_loss"])


def governed(folder: Path, fault: Fault | None = None, **options: Any) -> Run:
    config = options.pop("config", CONFIG)
    return Run(folder, fault or Fault("none"), TolariaCallback(config), **options)


def bare(folder: Path, **options: Any) -> Run:
    return Run(folder, Fault("none"), None, **options)


def language_model() -> Any:
    """A GPT-2 of some thousand parameters."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sentences(n: int = 256) -> list[dict[str, torch.Tensor]]:
    """Counting, from somewhere."""
    tokens = (torch.arange(12) + torch.arange(n).unsqueeze(1)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def is_sane(losses: list[float]) -> bool:
    return bool(losses) and all(math.isfinite(loss) and loss > 0 for loss in losses)
