"""Handwritten digits: scikit-learn's 1,797 real images of 8 x 8 pixels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tolaria._optional import require
from tolaria.nn.host import create_host
from tolaria.tasks.data import TaskData, TensorBatches
from tolaria.tasks.spec import TaskSpec, TrainSettings

TEST_ROWS, VALIDATION_ROWS = 450, 150
_SPLIT_SEED = 0  # the split is part of the task, so that figures compare


def load_digits(*, batch_size: int = 64, rng_seed: int = 0, data_dir: Path | None = None) -> TaskData:
    """1,197 training, 150 validation and 450 test images, (B, 1, 8, 8) float32, normalised.

    Args:
        batch_size: of the training batches.
        rng_seed: seeds their order; the split is always the same.
        data_dir: not needed, the images come with scikit-learn.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", feature="the digits task", package="scikit-learn", extra="train")
    raw = datasets.load_digits()
    images = torch.from_numpy(raw.images).float().unsqueeze(1).sub_(4.884).div_(6.017)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED), device="cpu")
    test, rest = order[:TEST_ROWS], order[TEST_ROWS:]
    validation, train = rest[:VALIDATION_ROWS], rest[VALIDATION_ROWS:]
    return TaskData(
        train=TensorBatches(images[train], labels[train], batch_size, shuffle=True, rng_seed=rng_seed),
        validation=TensorBatches(images[validation], labels[validation], 512),
        test=TensorBatches(images[test], labels[test], 512),
    )


def _host() -> nn.Module:
    return create_host("cnn", in_channels=1, num_classes=10, widths=(8, 16))


def _example() -> Tensor:
    return torch.zeros(2, 1, 8, 8, device="cpu")


def make_spec() -> TaskSpec:
    """The task ``digits``."""
    return TaskSpec(
        name="digits",
        summary="scikit-learn's 8x8 handwritten digits, a deliberately small CNN",
        topology="cnn",
        num_classes=10,
        model_factory=_host,
        load_data=load_digits,
        example_input=_example,
        needs_files=False,
        defaults=TrainSettings(
            batch_size=64,
            host_steps=600,
            incubate_steps=200,
            blend_steps=200,
            finish_steps=1500,
            trial_steps=200,
            lr=1e-2,
            seed_lr=1e-2,
            slot="stage0",
            blueprint="conv",
        ),
    )
