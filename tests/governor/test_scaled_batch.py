"""One batch that is scaled by 1e4: the loss shows nothing, the running statistics do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.suspicious_run import SUSPICIOUS, promotions, rollbacks, suspicions
from tolaria.governor import (
    AcceptanceEvent,
    GovernorConfig,
    GovernorEvent,
    RollbackEvent,
    TolariaGovernor,
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def norm_network(device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(3, (400,))
    x = torch.randn(400, 6) + 2.0 * nn.functional.one_hot(labels, 6)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return model.to(device), x.to(device), labels.to(device)


def accuracy(model: nn.Module, x: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        score = float((model(x).argmax(1) == labels).float().mean())
    model.train()
    return score


def train_with_a_scaled_batch(
    device: str, config: GovernorConfig
) -> tuple[list[GovernorEvent], list[float], int]:
    """Events, the accuracy after each step, and the step of the bad batch."""
    model, x, labels = norm_network(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    governor = TolariaGovernor(model, optimizer, config=config, num_classes=3)
    events, scores, bad = [], [], 100
    for step in range(1, 301):
        rows = torch.arange(32 * step, 32 * step + 32) % 300
        batch = x[rows] * (1e4 if step == bad else 1.0)
        loss = nn.functional.cross_entropy(model(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        governor.step(loss)
        events += governor.synchronize()
        scores.append(accuracy(model, x[300:], labels[300:]))
    return events, scores, bad


def test_running_statistics_of_one_scaled_batch_are_never_promoted(place: str) -> None:
    events, scores, bad = train_with_a_scaled_batch(place, GovernorConfig(snapshot_interval=20))
    assert scores[bad - 2] > 0.85
    assert max(scores[bad - 1 : bad + 80]) < 0.7  # the loss shows nothing of it
    told = suspicions(events)
    assert told
    assert all(name is not None and name.startswith("1.running_") and not rolls for name, rolls in told)
    assert not rollbacks(events)
    at = promotions(events)
    assert max(step for step in at if step < bad) == bad - 20
    first = min(step for step in at if step >= bad)
    assert scores[first - 1] > 0.8  # promoted again once it has healed
    assert max(at) >= 280


def test_one_scaled_batch_is_undone_where_the_settings_say_so(place: str) -> None:
    config = GovernorConfig(snapshot_interval=20, suspicious_state="rollback")
    events, scores, bad = train_with_a_scaled_batch(place, config)
    ((reason, name, step),) = rollbacks(events)
    assert (reason, step) == (SUSPICIOUS, bad - 20)
    assert name is not None
    assert name.startswith("1.running_")
    caught = next(e.step for e in events if isinstance(e, RollbackEvent))
    assert caught <= bad + 21
    assert min(scores[caught - 1 :]) > 0.8
    assert not any(isinstance(e, AcceptanceEvent) for e in events)


def test_switched_off_nothing_is_told() -> None:
    events, *_ = train_with_a_scaled_batch(
        "cpu", GovernorConfig(snapshot_interval=20, suspicious_state="off")
    )
    assert len(promotions(events)) == 14
    assert not suspicions(events)
