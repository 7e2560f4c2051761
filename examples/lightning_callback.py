"""One line in Lightning: a NaN gradient, a NaN moment and a bad learning rate, and no poisoned checkpoint.

    python examples/lightning_callback.py

needs ``pip install ".[lightning]"``.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria import GovernorConfig
from tolaria.governor import RollbackEvent
from tolaria.integrations.lightning import TolariaCallback


class Classifier(LightningModule):
    """Which third of the circle a point lies in; broken on purpose at some steps."""

    def __init__(self, faults: dict[int, str]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
        self.num_classes = 3
        self.faults = faults

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss; Lightning does the rest."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Break something."""
        weight: Any = self.net[0].weight
        fault = self.faults.pop(self.global_step, "")
        if fault == "gradient":
            weight.grad[0, 0] = math.nan
        elif fault == "moment":
            optimizer.state[weight]["exp_avg"][0, 0] = math.nan
        elif fault == "rate":
            optimizer.param_groups[0]["lr"] *= 1e4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(epochs: int = 12) -> tuple[float, int]:
    """Train; return the final loss, and how many checkpoints are poisoned."""
    torch.manual_seed(0)
    angle = torch.rand(512) * 2 * math.pi
    points = torch.stack([angle.cos(), angle.sin()], 1)
    loader = DataLoader(
        TensorDataset(points, (angle * 3 / (2 * math.pi)).long()), batch_size=32, shuffle=True
    )
    with tempfile.TemporaryDirectory() as folder:
        callback = TolariaCallback(GovernorConfig.balanced(snapshot_interval=25), sinks=[tell])
        trainer = Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[callback, ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier({60: "gradient", 90: "moment", 110: "rate"}), loader)
        written = [torch.load(path, weights_only=True)["state_dict"] for path in Path(folder).glob("*.ckpt")]
    poisoned = sum(not all(bool(t.isfinite().all()) for t in state.values()) for state in written)
    loss = float(trainer.callback_metrics["loss"])
    print(
        f"{trainer.global_step} steps, loss {loss:.3f}; {poisoned} of {len(written)} checkpoints are poisoned"
    )
    return loss, poisoned


def tell(event: object) -> None:
    """Print rollbacks."""
    if isinstance(event, RollbackEvent):
        report = event.report
        print(f"step {report.tag}: {report.reason.name}, back to the state of step {report.restored_step}")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    main()
