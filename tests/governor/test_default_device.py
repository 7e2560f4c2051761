"""A default device or dtype that is set globally changes nothing: a governor lives where its model is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import tolaria
from tolaria import GovernorConfig, TolariaGovernor
from tolaria.nn import MorphogeneticModel


def material() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    return model, torch.randn(8, 4), torch.randint(2, (8,))


def governed(model: nn.Module, x: Tensor, y: Tensor, backend: str) -> tuple[list[Tensor], list[str]]:
    """A run with captures, a rollback, one by hand, a skip and a state saved and loaded: weights, events."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # AdamW of torch 2.9 cannot do it
    config = GovernorConfig(
        snapshot_interval=5, min_history=4, gradient_norm=True, skip_anomalous_steps=True, restore_rng=True
    )
    with tolaria.backend(backend):
        governor = TolariaGovernor(model, optimizer, num_classes=2, config=config)
        for step in range(24):
            loss = nn.functional.cross_entropy(model(x), y)
            if step in (12, 13, 14, 15):
                loss = loss * float("nan")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            governor.step(loss)
        governor.step(1.0, nonfinite=False)
        governor.execute_rollback()
        governor.load_state_dict(governor.state_dict())
        governor.snapshot()
        governor.reset()
        events = [event.kind for event in governor.poll()]
    return [p.detach().clone() for p in model.parameters()], events


@contextmanager
def default(kind: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    if kind == "dtype":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("kind", ["device", "dtype"])
def test_a_global_default_changes_nothing(kind: str, backend: str) -> None:
    weights, events = governed(*material(), backend)
    model, x, y = material()
    with default(kind):
        again, same_events = governed(model, x, y, backend)
    assert same_events == events
    assert "rollback" in events
    for left, right in zip(weights, again, strict=True):
        assert torch.equal(left, right)


def test_a_growing_model_under_a_default_device() -> None:
    host = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    example = torch.zeros(2, 4)
    with default("device"):
        model = MorphogeneticModel(host, {"seed": "1"}, example_input=example)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        governor = TolariaGovernor(model, optimizer, config=GovernorConfig(snapshot_interval=5))
        slot = model.germinate("seed", lambda features: nn.Linear(8, 8), rng_seed=1)
        slot.start_training()
        schedule = slot.start_blending(4)
        optimizer.add_param_group({"params": model.seed_parameters()})
        for _ in range(8):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            governor.step(loss)
        governor.execute_rollback()
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}
