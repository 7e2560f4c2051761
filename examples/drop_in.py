"""An ordinary training loop, made safe: the governor takes three lines, the rest is yours.

    python examples/drop_in.py

Nothing here is tolaria's but the three lines marked so. Half way a NaN loss wrecks every weight and every
moment of the optimizer, as a bad batch would; the run goes on as if it had not been.
"""

from __future__ import annotations

import torch
from torch import nn

from tolaria import GovernorConfig, TolariaGovernor  # tolaria (1)


def main(steps: int = 400, broken_step: int = 250) -> float:
    """Train on two moons of points; returns the accuracy in percent."""
    torch.manual_seed(0)
    angle, label = torch.rand(2000) * torch.pi, torch.randint(0, 2, (2000,))
    sign = 1.0 - 2.0 * label
    points = torch.stack((angle.cos() * sign + label, angle.sin() * sign + 0.5 * label), dim=1)
    points += 0.15 * torch.randn_like(points)

    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    governor = TolariaGovernor(  # tolaria (2)
        model, optimizer, num_classes=2, config=GovernorConfig(snapshot_interval=50)
    )

    for step in range(1, steps + 1):
        rows = torch.randint(0, len(points), (128,))
        loss = criterion(model(points[rows]), label[rows])
        if step == broken_step:
            loss = loss * float("nan")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss)  # tolaria (3): judge, restore if need be, capture if due; no sync

        for event in governor.poll():  # optional: what it has to say; never waits
            if event.kind == "rollback":
                report = event.report
                back = f"back to the state of step {report.restored_step}"
                print(f"step {report.step}: {report.reason.name}, {back}")

    with torch.no_grad():
        accuracy = 100.0 * float((model(points).argmax(1) == label).float().mean())
    print(f"accuracy {accuracy:.1f}% after {steps} steps, {governor.rollback_count} rollback")
    return accuracy


if __name__ == "__main__":
    main()
