"""One line with ignite: a broken batch and a NaN weight, and no poisoned checkpoint.

    python examples/ignite_handler.py

needs ``pip install ".[ignite]"``.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, TerminateOnNan
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria import GovernorConfig
from tolaria.governor import GovernorEvent, RollbackEvent
from tolaria.integrations.ignite import TolariaHandler


def main(epochs: int = 8) -> tuple[float, int]:
    """Train; return the last loss, and how many checkpoints are poisoned."""
    torch.manual_seed(0)
    angle = torch.rand(512) * 2 * math.pi
    points = torch.stack([angle.cos(), angle.sin()], 1)
    data = TensorDataset(points, (angle * 3 / (2 * math.pi)).long())
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    config = GovernorConfig.balanced(snapshot_interval=25)
    TolariaHandler(model, optimizer, config=config, num_classes=3, sinks=[tell]).attach(
        trainer
    )  # the one line
    trainer.add_event_handler(Events.ITERATION_COMPLETED, TerminateOnNan())

    @trainer.on(Events.ITERATION_STARTED(once=60))
    def break_a_batch(engine: Engine) -> None:
        engine.state.batch[0][0] = math.nan

    @trainer.on(Events.ITERATION_COMPLETED(once=160))
    def break_a_weight(engine: Engine) -> None:
        with torch.no_grad():
            model[0].weight[0, 0] = math.nan

    with tempfile.TemporaryDirectory() as folder:
        saver = Checkpoint({"model": model, "optimizer": optimizer}, DiskSaver(folder), n_saved=None)
        trainer.add_event_handler(Events.ITERATION_COMPLETED(every=20), saver)
        trainer.run(DataLoader(data, batch_size=16, shuffle=True), max_epochs=epochs)
        written = [torch.load(path, weights_only=True)["model"] for path in Path(folder).glob("*.pt")]
    poisoned = sum(not all(bool(t.isfinite().all()) for t in state.values()) for state in written)
    print(f"{trainer.state.iteration} iterations; {poisoned} of {len(written)} checkpoints are poisoned")
    return trainer.state.output, poisoned


def tell(event: GovernorEvent) -> None:
    """Print rollbacks."""
    if isinstance(event, RollbackEvent):
        report = event.report
        print(f"step {report.step}: {report.reason.name}, back to the state of step {report.restored_step}")


if __name__ == "__main__":
    main()
