"""A small classifier in Lightning, and nine ways to break its run."""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import is_poisoned, tensors_in

FAULTS = ("loss", "gradient", "weight", "moment", "buffer", "spike", "batch", "collapse", "large-lr")
AT = 24
"""The step at which they happen, from 1."""
STEPS_AN_EPOCH, EPOCHS = 16, 4


def loaders(*, size: int = 8) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size * STEPS_AN_EPOCH, 6, generator=generator)
    y = (x[:, :3].argmax(1) + (x[:, 3] > 0.5)) % 3
    data = TensorDataset(x, y)
    shuffled = DataLoader(data, batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(2))
    return shuffled, DataLoader(data, batch_size=64)


def make_module(package: str, *, fault: str = "", at: int = AT, schedule: str = "", **options: Any) -> Any:
    """A module of that package, broken at step ``at``."""
    base = importlib.import_module(package).LightningModule

    class Classifier(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
            self.num_classes = 3
            self.seen = 0
            self.automatic_optimization = not options.get("manual", False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            x, y = batch
            if fault == "batch" and self.is_due:
                x = torch.full_like(x, math.nan)
            loss = nn.functional.cross_entropy(self(x).float(), y)
            if fault == "loss" and self.is_due:
                loss = loss * math.nan
            if fault == "spike" and self.is_due:
                loss = loss * 1e6
            if not options.get("quiet"):
                self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss if self.automatic_optimization else self.step_by_hand(loss)

        def step_by_hand(self, loss: Tensor) -> Any:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
            return loss if options.get("returns_loss") else None

        @property
        def is_due(self) -> bool:
            return self.seen == at

        def on_after_backward(self) -> None:
            if fault == "gradient" and self.is_due:
                self.net[0].weight.grad[0, 0] = math.nan

        @torch.no_grad()
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if not self.is_due:
                return
            optimizer = self.trainer.optimizers[0]
            if fault == "weight":
                self.net[0].weight[0, 0] = math.nan
            elif fault == "moment":
                optimizer.state[self.net[0].weight]["exp_avg"][0, 0] = math.nan
            elif fault == "buffer":
                self.net[1].running_mean[0] = math.nan
            elif fault == "collapse":
                self.net[3].weight.zero_()
                self.net[3].bias.zero_()
            elif fault == "large-lr":
                optimizer.param_groups[0]["lr"] *= 3000

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            self.log("val_loss", nn.functional.cross_entropy(self(x).float(), y))

        def configure_optimizers(self) -> Any:
            if options.get("manual"):
                return [
                    torch.optim.AdamW(self.net[:2].parameters(), lr=1e-2),
                    torch.optim.AdamW(self.net[3].parameters(), lr=1e-2),
                ]
            optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
            if not schedule:
                return optimizer
            schedulers = torch.optim.lr_scheduler
            made: dict[str, Any] = {
                "step": lambda: schedulers.OneCycleLR(optimizer, 2e-2, total_steps=STEPS_AN_EPOCH * EPOCHS),
                "epoch": lambda: schedulers.ExponentialLR(optimizer, 0.9),
                "plateau": lambda: schedulers.ReduceLROnPlateau(optimizer, patience=1),
            }
            config: dict[str, Any] = {"scheduler": made[schedule](), "interval": "epoch"}
            if schedule == "step":
                config["interval"] = "step"
            elif schedule == "plateau":
                config["monitor"] = "val_loss"
            return {"optimizer": optimizer, "lr_scheduler": config}

    return Classifier()


def state_of(trainer: Any, module: Any) -> list[Tensor]:
    """Copies of parameters, buffers and optimizer state."""
    moments = [
        value
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return [t.detach().clone() for t in (*module.state_dict().values(), *moments)]


def recorder(package: str) -> Any:
    """A callback that copies the state behind every step."""

    class Recorder(importlib.import_module(package).Callback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.states: dict[int, list[Tensor]] = {}

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.states[0] = state_of(trainer, pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.states[trainer.global_step] = state_of(trainer, pl_module)

    return Recorder()


def is_poisoned_checkpoint(path: Path) -> bool:
    """Whether a checkpoint holds what is not finite; callbacks have infinity for "none yet", but no NaN."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=False)
    callbacks = copy.deepcopy(checkpoint.pop("callbacks", {}))
    return is_poisoned(checkpoint) or any(bool(t.isnan().any()) for t in tensors_in(callbacks))
