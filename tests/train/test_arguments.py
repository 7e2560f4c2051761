"""What the loops and the validation are given: kinds of batches and outputs, and what they refuse."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import pytest
import torch
from small_hosts import cnn, image_batches
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from tolaria import (
    train_epoch_blended,
    train_epoch_incubator_mode,
    train_epoch_normal,
    validate_and_get_metrics,
)

CE = nn.CrossEntropyLoss()
LABELS = torch.tensor([0, 1, 1, 0])


class Masked(nn.Module):
    """Two inputs, a mapping of logits out, as other packages have it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.mask: Tensor | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        self.mask = attention_mask
        return {"logits": self.layer(input_ids)}


class Inputs(NamedTuple):
    ids: Tensor
    mask: Tensor


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4), "labels": LABELS},
        (Inputs(torch.ones(4, 3), torch.ones(4)), LABELS),
        ({"input_ids": torch.ones(4, 3), "attention_mask": torch.ones(4)}, LABELS),
    ],
    ids=["mapping", "named-tuple", "pair-of-mapping"],
)
def test_every_input_of_a_batch_reaches_the_model(batch: object) -> None:
    model = Masked()
    assert train_epoch_normal(model, [batch], CE, SGD(model.parameters(), 0.1), "cpu").samples == 4
    assert model.mask is not None
    model.mask = None
    validate_and_get_metrics(model, [], [batch], CE, "cpu")
    assert model.mask is not None


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_loss_of_soft_targets_is_the_criterions() -> None:
    logits, soft = torch.randn(9, 4), torch.rand(9, 4).softmax(1)
    batches = list(zip(logits.split(4), soft.split(4), strict=True))
    found = validate_and_get_metrics(Fixed(), [], batches, CE, "cpu")
    assert found.val_loss == pytest.approx(CE(logits.double(), soft.double()).item(), rel=1e-6)
    hits = (logits.argmax(1) == soft.argmax(1)).double().mean().item()
    assert found.val_accuracy == pytest.approx(100 * hits)


def test_soft_and_hard_targets_add_up() -> None:
    logits, labels = torch.randn(6, 3), torch.randint(3, (6,))
    hard = torch.nn.functional.one_hot(labels, 3).float()
    batches = [(logits[:2], labels[:2]), (logits[2:4], hard[2:4]), (logits[4:], labels[4:])]
    found = validate_and_get_metrics(Fixed(), [], batches, CE, "cpu").val_loss
    assert found == pytest.approx(CE(logits.double(), labels).item(), rel=1e-6)


def test_one_unbatched_sample_counts_as_one() -> None:
    logits, label = torch.randn(5), torch.tensor(2)
    found = validate_and_get_metrics(Fixed(), [], [(logits, label)], CE, "cpu")
    assert found.val_loss == pytest.approx(CE(logits, label).item(), rel=1e-6)


def test_ignored_label_of_a_partial_function_is_left_out() -> None:
    logits, labels = torch.randn(8, 3), torch.tensor([0, 0, 1, 2, 1, 2, 0, 1])
    criterion = functools.partial(nn.functional.cross_entropy, ignore_index=0)
    found = validate_and_get_metrics(
        Fixed(), [], [(logits[:3], labels[:3]), (logits[3:], labels[3:])], criterion, "cpu"
    )
    assert found.val_loss == pytest.approx(criterion(logits.double(), labels).item(), rel=1e-6)


@pytest.mark.parametrize("logits", [torch.randn(4, 1), torch.randn(4)], ids=["column", "vector"])
def test_figures_of_a_single_column_are_refused(logits: Tensor) -> None:
    """The largest of one is always right: 100% would be no figure."""
    batch = (logits, torch.ones_like(logits))
    with pytest.raises(TypeError, match=r"targets: .*probabilities of at least two classes"):
        validate_and_get_metrics(Fixed(), [], [batch], nn.BCEWithLogitsLoss(), "cpu")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": None}, TypeError, "model: expected an nn.Module, got NoneType"),
        ({"criterion": None}, TypeError, "criterion: expected a callable"),
        ({"trainloader": None}, TypeError, "trainloader: expected an iterable of batches, got NoneType"),
        ({"testloader": 3}, TypeError, "testloader: expected an iterable of batches, got int"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"train_batches": 2.5}, ValueError, "train_batches: expected an integer >= 0 or None, got 2.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_validation_names_what_is_wrong(changes: dict[str, object], error: type, match: str) -> None:
    arguments = {"model": Fixed(), "trainloader": [], "testloader": [], "criterion": CE, "device": "cpu"}
    with pytest.raises(error, match=match):
        validate_and_get_metrics(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model": None}, TypeError, "model: expected an nn.Module"),
        ({"criterion": 3}, TypeError, "criterion: expected a callable"),
        ({"optimizer": None}, TypeError, "optimizer: expected a torch optimizer, got NoneType"),
        ({"trainloader": None}, TypeError, "trainloader: expected an iterable"),
        ({"max_grad_norm": "1"}, ValueError, "max_grad_norm: expected a number above 0 or None, got '1'"),
        (
            {"schedulers": StepLR(SGD(cnn().parameters(), 0.1), 1)},
            TypeError,
            r"schedulers: .*pass \[scheduler\]",
        ),
        ({"schedulers": [3]}, TypeError, "schedulers: expected a sequence of objects with a step method"),
        ({"scaler": 3}, TypeError, "scaler: expected a torch.amp.GradScaler or None, got int"),
        ({"governor": 3}, TypeError, "governor: expected an object with .*check_vital_signs.*got int"),
        ({"hooks": 3}, TypeError, "hooks: expected an object with before_forward.*got int"),
        (
            {"criterion": nn.CrossEntropyLoss(reduction="none")},
            TypeError,
            r"criterion: expected a 0-dim tensor as the loss, got shape \(8,\)",
        ),
        ({"criterion": lambda logits, labels: 3.0}, TypeError, "as the loss, got float"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_loops_name_what_is_wrong(changes: dict[str, object], error: type, match: str) -> None:
    model = cnn().eval()
    before = {name: value.clone() for name, value in model.host.named_parameters()}
    arguments = {
        "model": model, "trainloader": image_batches(1), "criterion": CE,
        "optimizer": SGD(model.parameters(), 0.1), "device": "cpu",
    }  # fmt: skip
    with pytest.raises(error, match=match):
        train_epoch_normal(**{**arguments, **changes})  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.host.named_parameters())


def test_loops_with_a_seed_name_what_is_wrong() -> None:
    model = cnn()
    model.germinate("stage0", "conv").start_training()
    host, batches = SGD(model.host_parameters(), 0.1), image_batches(1)
    with pytest.raises(TypeError, match="seed_optimizer: expected a torch optimizer, got NoneType"):
        train_epoch_incubator_mode(model, batches, CE, host, None, "cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="alpha_schedules: expected a sequence"):
        train_epoch_blended(model, batches, CE, host, None, "cpu", alpha_schedules=[3])  # type: ignore[list-item]
    seed = SGD(model.seed_parameters(), 0.1)
    with pytest.raises(ValueError, match="seed_max_grad_norm: expected a number above 0"):
        train_epoch_incubator_mode(model, batches, CE, host, seed, "cpu", seed_max_grad_norm=math.nan)
