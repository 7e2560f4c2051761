"""Losses sample by sample, so that two networks can be compared on the same data, with a confidence."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolaria.nn.nest import to_device
from tolaria.nn.randomness import preserve_random_state
from tolaria.tasks.spec import TaskType
from tolaria.train.batch import call_model, split_batch
from tolaria.train.loaders import undisturbed
from tolaria.train.step import Criterion
from tolaria.train.validate import eval_mode, is_plain_cross_entropy, own_generators
from tolaria.train.weights import ignore_index_of, is_summed

ONE_SIDED_95 = 1.645
"""Standard errors below a mean that a normal one exceeds in 95 of 100 cases."""


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much one network's loss is below another's, paired by sample."""

    mean: float
    """Mean loss of the other less that of the one, per label; positive: the one is better."""
    error: float
    """Standard error of the mean over samples (sequences, for language models); inf for fewer than two."""
    samples: int
    """Samples compared."""
    loss: float
    """Mean loss of the one."""
    other: float
    """Mean loss of the other."""

    @property
    def lower(self) -> float:
        """What the gain exceeds with a confidence of 95%, by the samples looked at."""
        return self.mean - ONE_SIDED_95 * self.error

    @property
    def upper(self) -> float:
        """What the gain stays below with a confidence of 95%."""
        return self.mean + ONE_SIDED_95 * self.error

    def is_at_least(self, share: float) -> bool:
        """Whether, with that confidence, the gain is more than this share of the other's loss."""
        return self.lower > share * abs(self.other)


def compare(losses: Tensor, others: Tensor, counts: Tensor) -> Gain:
    """Two networks on the same samples.

    Args:
        losses: (N,) sums of losses of the one, a value per sample.
        others: (N,) those of the other.
        counts: (N,) labels of each sample that count.
    """
    rows = torch.stack([losses.double(), others.double(), counts.double()])
    rows = rows[:, rows[2] > 0].cpu()  # sync: the answer is wanted
    total, samples = float(rows[2].sum()), rows.shape[1]
    if not samples:
        return Gain(math.nan, math.inf, 0, math.nan, math.nan)
    gains = rows[1] - rows[0]
    mean = float(gains.sum()) / total
    spread = float((gains - mean * rows[2]).square().sum())  # of a ratio of means
    error = math.sqrt(spread * samples / (samples - 1)) / total if samples > 1 else math.inf
    return Gain(mean, error, samples, float(rows[0].sum()) / total, float(rows[1].sum()) / total)


def losses_by_sample(
    model: nn.Module,
    loader: Iterable[object],
    criterion: Criterion,
    device: torch.device,
    task_type: TaskType = "classification",
    *,
    amp_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Each sample's loss in eval mode, and how many of its labels count; no trace is left.

    Args:
        model: inputs to logits.
        loader: batches, in the same order each time they are to be compared.
        criterion: taken sample by sample, where it is not plain cross entropy.
        device: where the batches go.
        task_type: as for :func:`validate_and_get_metrics`.
        amp_dtype: autocast dtype, or None.

    Returns:
        (N,) sums of losses and (N,) counts, float64 on the device.
    """
    found: list[tuple[Tensor, Tensor]] = []
    autocast = torch.autocast(device.type, dtype=amp_dtype) if amp_dtype is not None else nullcontext()
    with (
        preserve_random_state(*own_generators(loader)),
        eval_mode(model),
        torch.no_grad(),
        autocast,
        undisturbed(loader) as batches,
    ):
        for batch in batches:
            inputs, targets = split_batch(batch)
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            found.append(by_sample(call_model(model, inputs), targets, criterion, task_type))
    if not found:
        nothing = torch.empty(0, dtype=torch.float64, device=device)
        return nothing, nothing
    sums, counts = zip(*found, strict=True)
    return torch.cat(sums), torch.cat(counts)


def by_sample(
    logits: Tensor, targets: Tensor, criterion: Criterion, task_type: TaskType
) -> tuple[Tensor, Tensor]:
    """(B,) sums of losses and (B,) counts of labels, float64: those of each sample of a batch."""
    rows = targets.shape[0]
    is_tokens = task_type == "lm" and logits.dim() > 2
    if targets.is_floating_point():
        counts = torch.ones(rows, dtype=torch.float64, device=targets.device)
    else:
        kept = (targets != ignore_index_of(criterion)).view(rows, -1)
        counts = kept.sum(dim=1, dtype=torch.float64)
    if is_plain_cross_entropy(criterion) and not targets.is_floating_point():
        scores = logits.flatten(0, -2) if is_tokens else logits
        labels = targets.flatten() if is_tokens else targets
        each = F.cross_entropy(
            scores.float(), labels, reduction="none", ignore_index=ignore_index_of(criterion)
        )
        return each.double().view(rows, -1).sum(dim=1), counts
    losses = []
    for i in range(rows):  # what a criterion does within a batch is its own business
        scores, labels = logits[i : i + 1], targets[i : i + 1]
        if is_tokens:
            scores, labels = scores.flatten(0, -2), labels.flatten()
        losses.append(criterion(scores, labels).double().sum())
    sums = torch.stack(losses)
    if not is_summed(criterion):
        sums = torch.where(counts > 0, sums * counts, 0.0)
    return sums, counts
