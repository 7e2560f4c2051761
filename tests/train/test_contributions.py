"""What a seed is worth: by sample, for all slots in one pass; and the control it is judged by."""

from __future__ import annotations

import math

import pytest
import torch
from small_hosts import cnn, image_batches, token_batches, transformer
from torch import Tensor, nn
from torch.optim import AdamW

from tolaria import MorphogeneticModel, SeedStage, validate_and_get_metrics
from tolaria.nn import register_blueprint
from tolaria.nn.randomness import random_state, streams_drawn
from tolaria.train import grow, seed_contributions, train_epoch_blended
from tolaria.train.samples import compare, losses_by_sample

CE = nn.CrossEntropyLoss()


def grown_cnn() -> MorphogeneticModel:
    model = cnn()
    for name, stage in (("stage0", SeedStage.FOSSILIZED), ("stage1", SeedStage.BLENDING)):
        model.germinate(name, "conv").start_training()
        model.blend(name, 10, "linear")
        optimizer = AdamW(model.parameters(), 1e-2)
        train_epoch_blended(
            model, image_batches(10 if stage is SeedStage.FOSSILIZED else 6), CE, optimizer, None, "cpu"
        )
        if stage is SeedStage.FOSSILIZED:
            model.fossilize(name)
    return model


def grown_transformer() -> MorphogeneticModel:
    model = transformer()
    for name, blueprint in (("attention0", "attention"), ("block1", "mlp")):
        model.germinate(name, blueprint).start_training()
        model.blend(name, 6)
    optimizer = AdamW(model.parameters(), 1e-2)
    train_epoch_blended(model, token_batches(6), CE, optimizer, None, "cpu", "lm")
    return model


@pytest.mark.parametrize(
    "criterion", [CE, nn.CrossEntropyLoss(label_smoothing=0.1)], ids=["plain", "smoothed"]
)
@pytest.mark.parametrize(
    ("model", "batches", "task_type"),
    [(grown_cnn(), image_batches(5), "classification"), (grown_transformer(), token_batches(4), "lm")],
    ids=["images", "tokens"],
)
def test_one_pass_says_what_bypassing_each_says(model, batches, task_type, criterion):  # type: ignore[no-untyped-def]
    before = random_state()
    found = seed_contributions(model, batches, criterion, task_type=task_type)
    assert not streams_drawn(before)
    assert list(found) == [name for name, slot in model.slots.items() if slot.seed is not None]

    def loss() -> float:
        return validate_and_get_metrics(model, [], batches, criterion, "cpu", task_type=task_type).val_loss

    whole = loss()
    for name, gain in found.items():
        with model.slot(name).bypassed():
            without = loss()
        assert gain.loss == pytest.approx(whole, rel=1e-5)
        assert gain.other == pytest.approx(without, rel=1e-5)
        assert gain.mean == pytest.approx(without - whole, abs=1e-5)
        assert 0 < gain.error < math.inf


def test_error_is_that_of_a_paired_mean() -> None:
    a, b = torch.rand(40), torch.rand(40)
    gain = compare(a, b, torch.ones(40))
    assert gain.mean == pytest.approx(float((b - a).mean()), rel=1e-5)
    assert gain.error == pytest.approx(float((b - a).std() / math.sqrt(40)), rel=1e-5)
    assert gain.is_at_least((gain.lower - 1e-9) / gain.other)
    assert not gain.is_at_least((gain.lower + 1e-9) / gain.other)
    assert compare(a[:1], b[:1], torch.ones(1)).error == math.inf
    assert compare(a[:0], b[:0], torch.ones(0)).samples == 0
    assert not compare(a[:0], b[:0], torch.ones(0)).is_at_least(-10.0)


def test_losses_by_sample_leave_ignored_labels_out() -> None:
    model = transformer(dropout=0.0)
    x, y = token_batches(1)[0]
    y = y.clone()
    y[0, 2:] = -100
    y[3] = -100
    sums, counts = losses_by_sample(model, [(x, y)], CE, torch.device("cpu"), "lm")
    smoothed, _ = losses_by_sample(
        model, [(x, y)], lambda logits, labels: CE(logits, labels), torch.device("cpu"), "lm"
    )
    assert counts.tolist() == [2, 8, 8, 0, 8, 8, 8, 8]
    metrics = validate_and_get_metrics(model, [], [(x, y)], CE, "cpu", num_classes=17, task_type="lm")
    assert float(sums.sum() / counts.sum()) == pytest.approx(metrics.val_loss, rel=1e-5)
    torch.testing.assert_close(sums, smoothed)


def test_no_seed_that_counts_contributes_nothing() -> None:
    model = cnn()
    model.germinate("stage0", "conv").start_training()
    assert seed_contributions(model, image_batches(1)) == {}
    assert seed_contributions(grown_cnn(), [])["stage0"].samples == 0


class Absorbed(nn.Module):
    """A scale that the next layers can take over: it helps nothing."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + self.scale)


def test_a_seed_that_the_host_only_leans_on_is_culled_and_the_host_alone_is_told_beside() -> None:
    register_blueprint("absorbed", Absorbed, replace=True)
    result = grow(
        "digits",
        blueprint="absorbed",
        host_steps=150,
        incubate_steps=20,
        blend_steps=40,
        finish_steps=60,
        trial_steps=30,
    )
    assert result.outcome == "culled"
    assert "beside the host alone for the same steps" in result.seeds[-1].reason
    alone = grow(
        "digits", host_steps=150, incubate_steps=20, blend_steps=40, finish_steps=60, max_germinations=0
    )
    assert result.test == result.control_test == alone.test  # it goes on as if there had been no seed


def test_the_control_is_the_host_alone_bit_for_bit() -> None:
    phases = {"host_steps": 30, "incubate_steps": 10, "blend_steps": 20, "finish_steps": 15, "trial_steps": 5}
    grown = grow("digits", min_gain=-10.0, **phases)
    alone = grow("digits", max_germinations=0, **phases)
    assert grown.outcome == "fossilized"
    assert grown.control_test == alone.test
    assert grown.test != alone.test
