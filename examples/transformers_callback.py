"""One line with Transformers' Trainer: a NaN gradient and a NaN moment, and no poisoned checkpoint.

    python examples/transformers_callback.py

needs ``pip install ".[transformers]"``. A small GPT-2, made here, learns to count.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from tolaria import GovernorConfig
from tolaria.governor import GovernorEvent, RollbackEvent
from tolaria.integrations.transformers import TolariaCallback

WORDS = 24


class Trouble(TrainerCallback):
    """What a bad batch, or a bad device, does."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # noqa: ANN001, ANN003, ANN201, D102
        if state.global_step == 60:
            next(model.parameters()).grad[0, 0] = math.nan

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):  # noqa: ANN001, ANN003, ANN201, D102
        if state.global_step == 89:
            next(iter(optimizer.state.values()))["exp_avg"][0, 0] = math.nan


def main(steps: int = 120) -> tuple[float, int]:
    """Train; return the last loss, and how many checkpoints are poisoned."""
    torch.manual_seed(0)
    tokens = (torch.arange(12) + torch.arange(256).unsqueeze(1)) % WORDS
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, save_steps=10, logging_steps=20, learning_rate=1e-2, use_cpu=True,
            report_to=[], disable_tqdm=True, per_device_train_batch_size=16, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Trouble()])
        config = GovernorConfig.balanced(snapshot_interval=25)
        TolariaCallback(config, sinks=[tell]).install(trainer)  # the one line
        trainer.train()
        written = [load_file(path) for path in Path(folder).rglob("model.safetensors")]
    poisoned = sum(not all(bool(t.isfinite().all()) for t in state.values()) for state in written)
    loss = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    found = f"{poisoned} of {len(written)} checkpoints are poisoned"
    print(f"{trainer.state.global_step} steps, loss {loss:.3f}; {found}")
    return loss, poisoned


def tell(event: GovernorEvent) -> None:
    """Print rollbacks."""
    if isinstance(event, RollbackEvent):
        report = event.report
        print(f"step {report.step}: {report.reason.name}, back to the state of step {report.restored_step}")


if __name__ == "__main__":
    main()
