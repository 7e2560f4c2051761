"""Validation: figures by sample and by token, and no trace left behind."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_hosts import cnn, image_batches, token_batches, transformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria import validate_and_get_metrics
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.train.validate import is_plain_cross_entropy


class Fixed(nn.Module):
    """Logits straight from the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_plain_metrics_weigh_by_sample_whatever_the_batches() -> None:
    logits, labels = torch.randn(30, 10), torch.randint(10, (30,))
    batches = list(zip(logits.split([1, 9, 20]), labels.split([1, 9, 20]), strict=True))
    result = validate_and_get_metrics(Fixed(), batches[:1], batches, nn.CrossEntropyLoss(), "cpu")
    val_loss, val_accuracy, train_loss, train_accuracy, per_class, perplexity = result
    assert val_loss == pytest.approx(nn.functional.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert val_accuracy == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert train_loss == pytest.approx(nn.functional.cross_entropy(logits[:1], labels[:1]).item(), rel=1e-5)
    assert train_accuracy in (0.0, 100.0)
    assert per_class is None
    assert perplexity is None


@pytest.mark.parametrize(
    "criterion",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda logits, labels: nn.functional.cross_entropy(logits, labels),
    ],
    ids=["plain", "smoothed", "none", "sum", "function"],
)
def test_the_loss_is_the_criterions(criterion: nn.Module) -> None:
    logits, labels = torch.randn(12, 4), torch.randint(4, (12,))
    batches = list(zip(logits.split(5), labels.split(5), strict=True))
    smoothing = getattr(criterion, "label_smoothing", 0.0)
    expected = nn.functional.cross_entropy(logits.double(), labels, label_smoothing=smoothing).item()
    found = validate_and_get_metrics(Fixed(), [], batches, criterion, "cpu").val_loss
    assert found == pytest.approx(expected, rel=1e-6)


def test_only_plain_cross_entropy_is_plain() -> None:
    assert is_plain_cross_entropy(nn.CrossEntropyLoss(ignore_index=3))
    for criterion in (
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.NLLLoss(),
        nn.functional.cross_entropy,
    ):
        assert not is_plain_cross_entropy(criterion)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_language_models_count_tokens_and_leave_ignored_ones_out(smoothing: float) -> None:
    logits, labels = torch.randn(6, 7, 5), torch.randint(5, (6, 7))
    labels[0, :3] = labels[4] = 2
    batches = [(logits[:1], labels[:1]), (logits[4:5], labels[4:5]), (logits[1:], labels[1:])]
    criterion = nn.CrossEntropyLoss(ignore_index=2, label_smoothing=smoothing)
    result = validate_and_get_metrics(Fixed(), [], batches, criterion, "cpu", task_type="lm")
    every_logits = torch.cat([x.flatten(0, 1) for x, _ in batches])
    every_label = torch.cat([y.flatten() for _, y in batches])
    expected = criterion(every_logits.double(), every_label).item()
    kept = every_label != 2
    accuracy = (every_logits.argmax(1) == every_label)[kept].double().mean().item()
    assert result.val_loss == pytest.approx(expected, rel=1e-6)
    assert result.val_accuracy == pytest.approx(100 * accuracy)
    assert result.perplexity == pytest.approx(math.exp(result.val_loss))
    assert math.isnan(result.train_loss)


def test_perplexity_may_be_infinite() -> None:
    logits = torch.tensor([[[1e4, 0.0]]])
    batch = (logits, torch.ones(1, 1, dtype=torch.int64))
    result = validate_and_get_metrics(Fixed(), [], [batch], nn.CrossEntropyLoss(), "cpu", task_type="lm")
    assert result.val_loss == 1e4
    assert result.perplexity == math.inf


def test_per_class_accuracy_is_nan_for_absent_classes() -> None:
    logits = torch.eye(4)[[0, 1, 1, 2]]
    labels = torch.tensor([0, 1, 0, 2])
    found = validate_and_get_metrics(
        Fixed(), [], [(logits, labels)], nn.CrossEntropyLoss(), "cpu", compute_per_class=True, num_classes=6
    ).per_class_acc
    assert found is not None
    assert found[:3] == [50.0, 100.0, 100.0]
    assert [math.isnan(each) for each in found] == [False] * 3 + [True] * 3
    with pytest.raises(ValueError, match=r"num_classes: expected at least 4, .* got 3"):
        validate_and_get_metrics(
            Fixed(),
            [],
            [(logits, labels)],
            nn.CrossEntropyLoss(),
            "cpu",
            compute_per_class=True,
            num_classes=3,
        )


@given(rows=st.lists(st.integers(0, 5), min_size=1, max_size=5), data=st.data())
@settings(max_examples=25)
def test_the_split_into_batches_does_not_matter(rows: list[int], data: st.DataObject) -> None:
    total = sum(rows)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 100)))
    logits = torch.randn(total, 3, generator=generator)
    labels = torch.randint(3, (total,), generator=generator)
    batches = list(zip(logits.split(rows), labels.split(rows), strict=True))
    many = validate_and_get_metrics(Fixed(), [], batches, nn.CrossEntropyLoss(), "cpu")
    one = validate_and_get_metrics(Fixed(), [], [(logits, labels)], nn.CrossEntropyLoss(), "cpu")
    assert many[:2] == pytest.approx(one[:2], rel=1e-5, nan_ok=True)


def test_an_empty_loader_gives_nan() -> None:
    result = validate_and_get_metrics(Fixed(), [], [], nn.CrossEntropyLoss(), "cpu", compute_per_class=True)
    assert all(math.isnan(value) for value in result[:4])
    assert result.per_class_acc is not None
    assert len(result.per_class_acc) == 10


def test_modes_and_every_random_stream_are_left_as_found() -> None:
    model = cnn(dropout=0.5)
    model.host.stages[1].eval()  # type: ignore[index,union-attr]
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = (torch.cat(parts) for parts in zip(*image_batches(3), strict=True))
    own = torch.Generator().manual_seed(5)
    loaders = [
        DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(images, labels), batch_size=4, shuffle=True, generator=own),
    ]
    np.random.random(), random.random()
    before, own_before = random_state(), own.get_state()
    for loader in loaders:
        validate_and_get_metrics(model, loader, loader, nn.CrossEntropyLoss(), "cpu")
    assert not streams_drawn(before)
    assert torch.equal(own.get_state(), own_before)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    model = cnn()
    with pytest.raises(TypeError, match="loader: expected batches"):
        validate_and_get_metrics(model, [], [torch.zeros(1)], nn.CrossEntropyLoss(), "cpu")
    assert all(module.training for module in model.modules())


def test_an_incubating_seed_does_not_change_the_figures() -> None:
    model, batches = transformer(), token_batches(2)

    def figures() -> tuple[object, ...]:
        return validate_and_get_metrics(
            model, batches, batches, nn.CrossEntropyLoss(), "cpu", task_type="lm", train_batches=1
        )

    before = figures()
    model.germinate("block0", "mlp").start_training()
    with torch.no_grad():
        model.seed_parameters()[0].fill_(float("nan"))
    assert figures() == before


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"task_type": "regression"}, ValueError, "task_type: expected one of .*got 'regression'"),
        ({"train_batches": -1}, ValueError, "train_batches"),
        ({"device": "quantum"}, ValueError, "type 'quantum'"),
    ],
    ids=["task", "batches", "device"],
)
def test_bad_options_are_named(options: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        validate_and_get_metrics(Fixed(), [], [], nn.CrossEntropyLoss(), **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_float_labels_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(TypeError, match="targets: expected integer labels"):
        validate_and_get_metrics(Fixed(), [], [(torch.zeros(3, 2), torch.zeros(3))], nn.MSELoss(), "cpu")
