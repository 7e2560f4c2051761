"""A run of Lightning's trainer that writes a checkpoint at every step, and what is in them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from integrations import lightning_runs as runs

from tolaria import GovernorConfig
from tolaria.integrations.lightning import TolariaCallback


def config(**settings: Any) -> GovernorConfig:
    return GovernorConfig.balanced(snapshot_interval=8, probation=2, **settings)


def fit(
    package: str,
    folder: Path,
    module: Any,
    callback: TolariaCallback | None,
    *others: Any,
    ckpt_path: Any = None,
    epochs: int = runs.EPOCHS,
    data: Any = None,
    checkpoints: bool = True,
    **options: Any,
) -> Any:
    pl = importlib.import_module(package)
    loggers = importlib.import_module(f"{package}.loggers")
    every = pl.callbacks.ModelCheckpoint(
        folder / "every", every_n_train_steps=1, save_top_k=-1, save_last=True, filename="{step}"
    )
    best = pl.callbacks.ModelCheckpoint(
        folder / "best", monitor="train_loss", save_top_k=2, save_weights_only=True
    )
    callbacks = [every, *others, best] if checkpoints else [*others]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks + ([callback] if callback else []),
        logger=loggers.CSVLogger(folder, name="log", version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=checkpoints,
        log_every_n_steps=1,
        default_root_dir=folder,
        **options,
    )
    trainer.fit(module, *(data or runs.loaders()), ckpt_path=ckpt_path)
    return trainer


def poisoned(folder: Path) -> list[str]:
    found = sorted(folder.rglob("*.ckpt"))
    assert found
    return [path.name for path in found if runs.is_poisoned_checkpoint(path)]
