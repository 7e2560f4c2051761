"""A loss for each sample is refused with the way to make it one, whoever judges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tolaria
from tolaria.governor import GovernorBank, TolariaGovernor


@pytest.fixture(params=["auto", "reference"])
def governor(request):
    model = nn.Linear(2, 2)
    with tolaria.backend(request.param):
        yield TolariaGovernor(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("shape", [(32,), (4, 8), (2, 1)])
def test_loss_of_many_samples_is_told_to_be_averaged(governor, shape):
    criterion = nn.CrossEntropyLoss(reduction="none")
    loss = (
        criterion(torch.randn(32, 3), torch.zeros(32, dtype=torch.long))[: shape[0]]
        if len(shape) == 1
        else torch.ones(shape)
    )
    for call in (governor.step, governor.check_vital_signs):
        with pytest.raises(
            ValueError, match=r"loss: expected one value .*got shape \[.*\]; pass loss\.mean\(\)"
        ):
            call(loss)


def test_no_loss_at_all_is_not_averaged(governor):
    with pytest.raises(ValueError, match=r"loss: expected one value .*got shape \[0\]$"):
        governor.step(torch.ones(0))


def test_flags_of_many_tensors_are_told_to_be_joined(governor):
    with pytest.raises(ValueError, match=r"nonfinite: expected one value .*; pass nonfinite\.any\(\)"):
        governor.step(torch.ones(()), nonfinite=torch.zeros(3, dtype=torch.bool))


def test_bank_of_many_is_not_told_so():
    with pytest.raises(ValueError, match=r"each of the 2 governors, got shape \[3\]$"):
        GovernorBank(2).step(torch.ones(3))


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_number_that_no_float_holds_is_refused(governor, name):
    with pytest.raises(ValueError, match=f"{name}: expected a number that a float can hold"):
        governor.step(**{"loss": 1.0, name: 10**400})
    assert governor.step_count == 0
