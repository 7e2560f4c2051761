"""Governors over one model: each rolls back to its own captures; none vouches for a state that is gone."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn

from tolaria.governor import GovernorBank, GovernorConfig, TolariaGovernor, peers


def governor(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: object) -> TolariaGovernor:
    config = GovernorConfig(**{"snapshot_interval": 5, "probation": 3, **settings})  # type: ignore[arg-type]
    return TolariaGovernor(model, optimizer, config=config)


def fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def values(model: nn.Module) -> set[float]:
    return {value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_capture_on_probation_does_not_outlive_the_rollback_of_another(device: str) -> None:
    model = nn.Linear(3, 2).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fill(model, 1.0)
    strict, patient = governor(model, optimizer), governor(model, optimizer, snapshot_interval=100)
    for _ in range(3):
        strict.step(1.0)
        patient.step(1.0)
    fill(model, 1e6)  # finite, so the patient one takes it for good
    patient.snapshot()
    patient.step(1.0)
    strict.step(math.nan)
    strict.synchronize()
    assert values(model) == {1.0}
    for _ in range(5):
        strict.step(1.0)
        patient.step(1.0)
    patient.execute_rollback()
    assert values(model) == {1.0}
    patient.snapshot()  # captures are promoted again
    for _ in range(3):
        patient.step(1.0)
    assert [event.kind for event in patient.synchronize()][-1] == "promotion"


@pytest.mark.parametrize("device", DEVICES)
def test_both_roll_back_and_the_run_goes_on(device: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    both = governor(model, optimizer), governor(model, optimizer, snapshot_interval=7)
    for step in range(60):
        x, y = torch.randn(8, 4, device=device), torch.randint(0, 3, (8,), device=device)
        loss = nn.functional.cross_entropy(model(x), y)
        if step in (20, 41):
            loss = loss * math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for one in both:
            one.step(loss)
    for one in both:
        one.synchronize()
    assert [one.rollback_count for one in both] == [2, 2]
    assert all(math.isfinite(value) for value in values(model))


@pytest.mark.cuda
def test_a_recorded_rollback_writes_to_no_memory_of_a_peer_that_is_gone() -> None:
    model = nn.Linear(3, 2).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stays, goes = governor(model, optimizer), governor(model, optimizer)
    loss = torch.ones((), device="cuda")
    stays.step(loss)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stays.step(loss)
    size = goes._attached.row.state.numel()
    goes.close()
    del goes
    gc.collect()
    strangers = torch.ones(64, size, dtype=torch.float64, device="cuda").unbind()
    strangers = [stranger.clone() for stranger in strangers]
    loss.fill_(math.nan)
    graph.replay()
    stays.synchronize()
    assert stays.rollback_count == 1
    assert all(bool((stranger == 1.0).all()) for stranger in strangers)


def test_rows_of_a_bank_are_peers_of_a_governor() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fill(model, 1.0)
    alone = governor(model, optimizer)
    bank = GovernorBank(2, config=GovernorConfig(snapshot_interval=5, probation=3))
    bank.attach(1, model, optimizer)
    fill(model, 1e6)
    alone.snapshot()
    bank.step(torch.tensor([1.0, math.nan]))
    assert values(model) == {1.0}
    for _ in range(5):
        alone.step(1.0)
    alone.execute_rollback()
    assert values(model) == {1.0}


def test_governors_of_other_parameters_are_left_alone() -> None:
    one, other, shared = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3).requires_grad_(False)
    first, second = (
        governor(nn.Sequential(shared, head), torch.optim.SGD(head.parameters(), lr=0.1))
        for head in (one, other)
    )
    fill(other, 2.0)
    second.snapshot()
    first.step(math.nan)
    for _ in range(3):
        second.step(1.0)
    assert [event.kind for event in second.poll()][-1] == "promotion"


@pytest.mark.parametrize("closed", [True, False])
def test_a_governor_that_is_gone_leaves_nothing_behind(closed: bool) -> None:
    gc.collect()
    before = dict(peers._BY_PARAMETER)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second = governor(model, optimizer), governor(model, optimizer)
    if closed:
        first.close()
        second.close()
        second.poll()
    del first, second
    gc.collect()
    assert dict(peers._BY_PARAMETER) == before
