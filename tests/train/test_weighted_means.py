"""Uneven batches: means by label that counts, and accumulation that is the step of the whole batch."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from small_hosts import cnn, image_batches
from torch import Tensor, nn
from torch.optim import SGD

from tolaria import train_epoch_normal, validate_and_get_metrics
from tolaria.train.step import Criterion
from tolaria.train.weights import ignore_index_of

WEIGHT = torch.tensor([0.2, 3.0, 1.0, 0.5, 1.0, 2.0, 0.1])

CRITERIA: dict[str, Criterion] = {
    "plain": nn.CrossEntropyLoss(),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.1),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHT),
    "weighted and smoothed": nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    "other label": nn.CrossEntropyLoss(ignore_index=3),
    "partial": functools.partial(F.cross_entropy, ignore_index=3, weight=WEIGHT),
    "summed": nn.CrossEntropyLoss(reduction="sum"),
    "function": lambda logits, labels: F.cross_entropy(logits, labels),
}


def tokens() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randint(7, (5, 6), generator=draw), torch.randint(7, (5, 6), generator=draw)
    y[0, 1:] = -100
    y[1, 2:] = -100
    y[3, :5] = 3
    return x, y


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))


@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("split", [[1, 1, 1, 1, 1], [2, 3], [1, 4]])
def test_accumulation_is_the_step_of_the_whole_batch(criterion: Criterion, split: list[int]) -> None:
    model, (x, y) = language_model(), tokens()
    if ignore_index_of(criterion) == 3:
        y[y == -100] = 0  # which would be an error of the criterion's
    whole = copy.deepcopy(model)
    micro = list(zip(x.split(split), y.split(split), strict=True))
    stats = train_epoch_normal(
        model, micro, criterion, SGD(model.parameters(), 0.1), "cpu", "lm", accumulation_steps=5
    )
    loss = criterion(whole(x).flatten(0, 1), y.flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    SGD(whole.parameters(), 0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))
    torch.testing.assert_close(stats.losses, loss.detach().view(1))


def test_micro_batch_without_a_label_that_counts_leaves_the_step_to_the_others() -> None:
    model, (x, y) = language_model(), tokens()
    y[2] = -100
    whole = copy.deepcopy(model)
    micro = list(zip(x.split(1), y.split(1), strict=True))
    criterion = nn.CrossEntropyLoss()
    stats = train_epoch_normal(
        model, micro, criterion, SGD(model.parameters(), 0.1), "cpu", "lm", accumulation_steps=5
    )
    criterion(whole(x).flatten(0, 1), y.flatten()).backward()
    SGD(whole.parameters(), 0.1).step()
    assert torch.isfinite(stats.losses).all()
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))


def test_accumulation_over_uneven_batches_of_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    whole = copy.deepcopy(model)
    x, y = torch.randn(10, 4), torch.rand(10, 3)
    micro = [(x[:7], y[:7]), (x[7:], y[7:])]
    stats = train_epoch_normal(
        model, micro, nn.BCEWithLogitsLoss(), SGD(model.parameters(), 0.1), "cpu", accumulation_steps=2
    )
    nn.BCEWithLogitsLoss()(whole(x), y).backward()
    SGD(whole.parameters(), 0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(whole.parameters()))
    assert stats.accuracy.isnan()


@pytest.mark.parametrize("accumulation", [1, 2, 5])
@pytest.mark.parametrize(
    "criterion",
    [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(reduction="sum")],
)
def test_epoch_says_what_validation_says(criterion: nn.Module, accumulation: int) -> None:
    model, (x, y) = language_model(), tokens()
    batches = list(zip(x.split([1, 1, 3]), y.split([1, 1, 3]), strict=True))
    still = SGD(model.parameters(), lr=0.0)
    stats = train_epoch_normal(model, batches, criterion, still, "cpu", "lm", accumulation_steps=accumulation)
    metrics = validate_and_get_metrics(model, [], batches, criterion, "cpu", num_classes=7, task_type="lm")
    assert stats.mean_loss.item() == pytest.approx(metrics.val_loss, rel=1e-6)
    assert stats.accuracy.item() == pytest.approx(metrics.val_accuracy)


def test_step_without_a_label_that_counts_is_left_out_of_the_mean() -> None:
    model, (x, y) = language_model(), tokens()
    y[2] = -100
    batches = list(zip(x.split(1), y.split(1), strict=True))
    still = SGD(model.parameters(), lr=0.0)
    stats = train_epoch_normal(model, batches, nn.CrossEntropyLoss(), still, "cpu", "lm")
    metrics = validate_and_get_metrics(model, [], batches, nn.CrossEntropyLoss(), "cpu", task_type="lm")
    assert stats.mean_loss.item() == pytest.approx(metrics.val_loss, rel=1e-6)


def test_accuracy_is_percent_on_the_device_and_nan_for_nothing() -> None:
    model = cnn(dropout=0.0)
    stats = train_epoch_normal(
        model, image_batches(3), nn.CrossEntropyLoss(), SGD(model.parameters(), 0.0), "cpu"
    )
    model.train()  # batch norm by batch, as in training
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in image_batches(3))
    assert stats.accuracy.item() == pytest.approx(100 * hits / 24)
    assert stats.accuracy.dtype is torch.float64
    nothing = train_epoch_normal(model, [], nn.CrossEntropyLoss(), SGD(model.parameters(), 0.0), "cpu")
    assert math.isnan(nothing.accuracy.item())
