"""One line under Accelerate: a NaN gradient and a NaN moment, and no poisoned checkpoint.

    python examples/accelerate_guard.py

needs ``pip install ".[accelerate]"``.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria import GovernorConfig
from tolaria.governor import RollbackEvent
from tolaria.integrations.accelerate import guard


def main(epochs: int = 12) -> tuple[float, int]:
    """Train; return the final loss, and how many checkpoints are poisoned."""
    torch.manual_seed(0)
    angle = torch.rand(512) * 2 * math.pi
    points = torch.stack([angle.cos(), angle.sin()], 1)
    loader = DataLoader(
        TensorDataset(points, (angle * 3 / (2 * math.pi)).long()), batch_size=16, shuffle=True
    )
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    weight = model[0].weight
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.Adam(model.parameters(), lr=1e-2), loader
    )
    config = GovernorConfig.balanced(snapshot_interval=25)
    governor = guard(accelerator, model, optimizer, config=config, num_classes=3, sinks=[tell])
    written = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(epochs):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and governor.step_count == 60:
                        weight.grad[0, 0] = math.nan
                    if accelerator.sync_gradients and governor.step_count == 90:
                        optimizer.state[weight]["exp_avg"][0, 0] = math.nan
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    path = Path(folder) / f"{governor.step_count}.pt"
                    accelerator.save(accelerator.get_state_dict(model), path)
                    written.append(torch.load(path, weights_only=True))
    governor.close()
    poisoned = sum(not all(bool(t.isfinite().all()) for t in state.values()) for state in written)
    print(f"{governor.step_count} steps; {poisoned} of {len(written)} checkpoints are poisoned")
    return float(loss.detach()), poisoned


def tell(event: object) -> None:
    """Print rollbacks."""
    if isinstance(event, RollbackEvent):
        report = event.report
        print(f"step {report.step}: {report.reason.name}, back to the state of step {report.restored_step}")


if __name__ == "__main__":
    main()
