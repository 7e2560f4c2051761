"""``TolariaCallback`` in TRL's trainers, and with PEFT's adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import Fault
from trainers import need, poisoned_files, same

need("transformers")

from transformers_runs import (  # noqa: E402
    CONFIG,
    VOCABULARY,
    FaultyTrainer,
    Records,
    Run,
    Strikes,
    arguments,
    is_sane,
    language_model,
    sentences,
    transformers,
)  # fmt: skip

from tolaria.integrations._transformers_found import classes_of_trainer  # noqa: E402
from tolaria.integrations.transformers import TolariaCallback  # noqa: E402

PATTERNS = ("*.safetensors", "optimizer.pt")


def adapted() -> Any:
    peft = need("peft")
    settings = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(language_model(), settings)


@pytest.mark.parametrize("name", ["loss", "gradient", "weight", "moment"])
def test_adapters(name: str, tmp_path: Path) -> None:
    events: list[Any] = []
    callback = TolariaCallback(CONFIG, sinks=[events.append])
    run = Run(
        tmp_path, Fault(name, at=20), callback, model=adapted, data=sentences(), max_steps=30, save_steps=10
    )
    assert run.records.recorder.exact == [True]
    assert not poisoned_files(tmp_path, *PATTERNS)
    assert callback.governor.rollback_count == 1
    assert is_sane(run.losses)
    frozen = sum(p.nbytes for p in run.trainer.model.parameters() if not p.requires_grad)
    assert events[0].state_bytes < frozen  # which is not covered


def test_the_loss_of_guessing_is_found_where_the_loss_is_known(tmp_path: Path) -> None:
    plain = transformers.Trainer(model=language_model(), args=arguments(tmp_path))
    assert classes_of_trainer(plain) == VOCABULARY
    assert classes_of_trainer(transformers.Trainer(model=adapted(), args=arguments(tmp_path))) == VOCABULARY
    assert classes_of_trainer(FaultyTrainer(model=language_model(), args=arguments(tmp_path))) is None
    config = transformers.BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        num_labels=5,
    )
    classifier = transformers.BertForSequenceClassification(config)
    assert classes_of_trainer(transformers.Trainer(model=classifier, args=arguments(tmp_path))) == 5


def tokenizer() -> Any:
    tokenizers = need("tokenizers")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="w0", eos_token="w0", bos_token="w0"
    )


def texts(n: int = 64) -> list[str]:
    return [" ".join(f"w{(i + j) % VOCABULARY}" for j in range(8)) for i in range(n)]


def trained(kind: str, folder: Path, fault: Fault, *, is_governed: bool = True, **options: Any) -> Any:
    trl, datasets = need("trl"), need("datasets")
    torch.manual_seed(0)
    common = {
        "output_dir": str(folder), "max_steps": 16, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "save_steps": 4, "logging_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "seed": 3, "bf16": False, "gradient_checkpointing": False, **options,
    }  # fmt: skip
    if kind == "sft":
        trainer = trl.SFTTrainer(
            model=language_model(), args=trl.SFTConfig(max_length=16, **common), processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"text": texts()}), callbacks=[Strikes(fault)],
        )  # fmt: skip
    else:
        settings = trl.GRPOConfig(num_generations=4, max_completion_length=4, temperature=1.0, **common)
        trainer = trl.GRPOTrainer(
            model=language_model(), args=settings, processing_class=tokenizer(),
            reward_funcs=lambda completions, **kwargs: [float(c.count("w1")) for c in completions],
            train_dataset=datasets.Dataset.from_dict({"prompt": texts()}), callbacks=[Strikes(fault)],
        )  # fmt: skip
    inner = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        return fault.loss(inner(*args, **kwargs), trainer.state.global_step + 1)

    if fault.name != "none":
        trainer.compute_loss = compute_loss
    callback = TolariaCallback(CONFIG.replace(snapshot_interval=4, probation=2)) if is_governed else None
    if callback is not None:
        callback.install(trainer)
    records = Records(callback)
    trainer.add_callback(records)
    trainer.train()
    return trainer, callback, records.recorder


@pytest.mark.parametrize("name", ["loss", "gradient", "weight", "moment"])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_run_survives(kind: str, name: str, tmp_path: Path) -> None:
    trainer, callback, recorder = trained(kind, tmp_path, Fault(name, at=8))
    assert trainer.state.global_step == 16
    assert callback.governor.rollback_count == 1
    assert recorder.exact == [True]
    assert not poisoned_files(tmp_path, *PATTERNS)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) >= 15
    assert all(entry["loss"] == entry["loss"] for entry in logged)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_clean_run_is_the_bare_one(kind: str, options: dict, tmp_path: Path) -> None:
    def ends(is_governed: bool) -> list[Any]:
        trainer, callback, _ = trained(
            kind, tmp_path / str(is_governed), Fault("none"), is_governed=is_governed, max_steps=8, **options
        )
        if callback is not None:
            assert callback.governor.rollback_count == 0
            assert callback.governor.step_count == 8
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [trainer.model.state_dict(), trainer.optimizer.state_dict(), losses]

    assert same(ends(True), ends(False))


def test_grpo_is_judged_by_gradients_alone(tmp_path: Path) -> None:
    _, callback, _ = trained("grpo", tmp_path, Fault("none"), max_steps=4)
    assert callback.governor.history == []
    assert callback.governor.random_guess_loss is None
