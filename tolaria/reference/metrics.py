"""``classification_metrics_`` in plain PyTorch: the oracle of ``csrc/math/metrics.h``, and the fallback."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from tolaria.reference import _checks

_OP = "tolaria.classification_metrics_"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class MetricsField(IntEnum):
    """Places in the accumulator; ``correct[C]`` and ``count[C]`` of the classes may follow."""

    LOSS_SUM = 0
    """Sum of the cross entropies (nats)."""
    COUNT = 1
    """Labels counted: neither ignored nor invalid."""
    CORRECT = 2
    """Labels that are the first largest logit."""
    TOPK_CORRECT = 3
    """Labels among the ``topk`` largest logits."""
    INVALID = 4
    """Labels out of range, left out (on CUDA; on the CPU they are an error)."""


def check_arguments(acc: Tensor, logits: Tensor, labels: Tensor, topk: int) -> None:
    """Shapes, dtypes and devices.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape, a device or ``topk`` does not fit.
    """
    op = "classification_metrics_"
    _checks.check_floating(op, "logits", logits)
    if logits.dim() < 1:
        raise ValueError(f"{_OP}: logits: expected shape (N, C), (N, C, d1, ...) or (C,), got a 0-dim tensor")
    class_dim = min(logits.dim() - 1, 1)
    _checks.check_strided(f"{_OP}: labels", labels)
    if labels.dtype not in _INTEGERS:
        got = _checks.dtype_name(labels.dtype)
        raise TypeError(f"{_OP}: labels: expected integers (class indices), got {got}")
    expected = [n for d, n in enumerate(logits.shape) if d != class_dim]
    if list(labels.shape) != expected:
        raise ValueError(
            f"{_OP}: labels: expected shape {expected} for logits of shape {list(logits.shape)} "
            f"(classes along dimension {class_dim}), got {list(labels.shape)}"
        )
    _checks.check_same_device(op, "labels", labels, "logits", logits)
    _checks.check_memory(op, "labels", labels)
    if acc.dtype != torch.float64:
        raise TypeError(f"{_OP}: acc: expected dtype float64, got {_checks.dtype_name(acc.dtype)}")
    classes, fields = logits.shape[class_dim], len(MetricsField)
    if acc.dim() != 1 or not acc.is_contiguous() or acc.shape[0] not in (fields, fields + 2 * classes):
        raise ValueError(
            f"{_OP}: acc: expected a contiguous vector of {fields} or, with per-class counts, "
            f"{fields + 2 * classes} values for {classes} classes, got shape {list(acc.shape)}"
        )
    _checks.check_same_device(op, "acc", acc, "logits", logits)
    _checks.check_memory(op, "acc", acc)
    if topk < 1:
        raise ValueError(f"{_OP}: topk: expected at least 1, got {topk}")


def _check_labels(valid: Tensor, labels: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU, where looking costs nothing, a label out of range is an error."""
    if valid.is_cpu and not valid.all():
        place = int(valid.logical_not().nonzero()[0])
        raise ValueError(
            f"{_OP}: labels: expected class indices from 0 to {classes - 1} or ignore_index {ignore_index}, "
            f"got {int(labels[place])} at position {place}"
        )


def _ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many logits stand before the label's, sorted as argmax would: NaN first, then the smaller index."""
    target = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    larger = (logits > target) | (logits.isnan() & ~target.isnan())
    equal = (logits == target) | (logits.isnan() & target.isnan())
    return (larger | (equal & earlier)).sum(1)


def classification_metrics_(
    acc: Tensor, logits: Tensor, labels: Tensor, ignore_index: int = -100, topk: int = 5
) -> None:
    """See :func:`tolaria.ops.classification_metrics_`."""
    check_arguments(acc, logits, labels, topk)
    logits = logits.detach()
    rows = logits.movedim(1, -1).flatten(0, -2) if logits.dim() > 1 else logits[None]
    flat = labels.flatten().long()
    classes = rows.shape[1]
    counted = flat != ignore_index
    valid = ((flat >= 0) & (flat < classes)) | ~counted
    _check_labels(valid, flat, classes, ignore_index)
    counted &= valid
    acc[MetricsField.INVALID] += (~valid).sum()
    if not classes:
        return
    values, index = rows.to(_checks.arithmetic_dtype(rows)), torch.where(counted, flat, 0)
    losses = torch.nn.functional.cross_entropy(values, index, reduction="none").double()
    ranks = _ranks(values, index)
    hits = (ranks == 0) & counted
    acc[MetricsField.LOSS_SUM] += torch.where(counted, losses, 0.0).sum()
    acc[MetricsField.COUNT] += counted.sum()
    acc[MetricsField.CORRECT] += hits.sum()
    acc[MetricsField.TOPK_CORRECT] += ((ranks < topk) & counted).sum()
    if acc.shape[0] > len(MetricsField):
        per_class = acc[len(MetricsField) :].view(2, classes)
        per_class[0].index_add_(0, index, hits.double())
        per_class[1].index_add_(0, index, counted.double())
