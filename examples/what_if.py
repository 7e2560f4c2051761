"""What if? Try three learning rates from one and the same state, and go on with the best.

    python examples/what_if.py

A snapshot by hand: no governor, no copies of state dicts. Every rate meets the same batches, since the random
generators go back, too.
"""

from __future__ import annotations

import torch
from torch import nn

from tolaria import Snapshot

RATES = (0.003, 0.03, 0.3)


def main(stretches: int = 6, steps: int = 30) -> float:
    """Train on two moons of points; returns the accuracy in percent."""
    torch.manual_seed(0)
    angle, label = torch.rand(2000) * torch.pi, torch.randint(0, 2, (2000,))
    sign = 1.0 - 2.0 * label
    points = torch.stack((angle.cos() * sign + label, angle.sin() * sign + 0.5 * label), dim=1)
    points += 0.15 * torch.randn_like(points)

    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATES[0], momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    snapshot = Snapshot(model, optimizer, restore_rng=True)

    def train(rate: float) -> float:
        """Some steps at ``rate``; the mean loss."""
        optimizer.param_groups[0]["lr"] = rate
        losses = []
        for _ in range(steps):
            rows = torch.randint(0, len(points), (128,))
            loss = criterion(model(points[rows]), label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    for stretch in range(1, stretches + 1):
        snapshot.capture()
        losses = {}
        for rate in RATES:
            losses[rate] = train(rate)
            snapshot.restore()
        best = min(RATES, key=losses.__getitem__)
        train(best)
        tried = "   ".join(f"{rate:g}: {loss:.4f}" for rate, loss in losses.items())
        print(f"stretch {stretch}   {tried}   goes on with {best:g}")

    with torch.no_grad():
        accuracy = 100.0 * float((model(points).argmax(1) == label).float().mean())
    print(f"accuracy {accuracy:.1f}%")
    return accuracy


if __name__ == "__main__":
    main()
