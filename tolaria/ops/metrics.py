"""Loss, accuracy, top-k and per-class counts of a batch, in one pass over its logits.

Source: csrc/math/metrics.h · reference: tolaria.reference.metrics · bench: bench/ops/bench_metrics.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tolaria import _backend
from tolaria.reference import _checks
from tolaria.reference import metrics as reference
from tolaria.reference.metrics import MetricsField


def classification_metrics_(
    acc: Tensor, logits: Tensor, labels: Tensor, ignore_index: int = -100, topk: int = 5
) -> None:
    """Add a batch's cross entropy and counts to ``acc``, in one pass over the logits.

    Nothing leaves the device. Logits are sorted as ``argmax`` does it: the larger first, NaN before
    everything, among equals the smaller index. The loss is that of ``cross_entropy`` without weights and
    smoothing, summed in float64.

    Args:
        acc: float64 vector of ``5`` values (:class:`MetricsField`) or ``5 + 2 * C``, then followed by
            correct and total counts of each class; updated in place. :class:`MetricsAccumulator` owns one.
        logits: ``(N, C)``, ``(N, C, d1, ...)`` or ``(C,)``, as for ``cross_entropy``; float32, float64,
            float16 or bfloat16, any strides.
        labels: class indices of shape ``(N,)``, ``(N, d1, ...)`` or ``()``; any integer dtype.
        ignore_index: labels with this value are left out of everything.
        topk: how many of the largest logits count as a hit for ``TOPK_CORRECT``.

    Raises:
        ValueError: a shape or device does not fit, or (on the CPU) a label is out of range; ``acc`` is then
            unchanged. On CUDA such labels are left out and counted in ``INVALID``.
        TypeError: an argument is no tensor, or of a dtype that is not listed.
    """
    if not (isinstance(acc, Tensor) and isinstance(logits, Tensor) and isinstance(labels, Tensor)):
        _checks.check_tensors("classification_metrics_", acc=acc, logits=logits, labels=labels)
    if _backend.fused(logits):
        try:
            torch.ops.tolaria.classification_metrics_.default(acc, logits, labels, ignore_index, topk)
        except NotImplementedError:
            reference.check_arguments(acc, logits, labels, topk)  # names the one that no kernel is for
            raise
    else:
        reference.classification_metrics_(acc, logits, labels, ignore_index, topk)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassificationMetrics:
    """What a :class:`MetricsAccumulator` held when it was read; means are NaN where nothing was counted."""

    loss: float
    """Mean cross entropy (nats per counted label)."""
    accuracy: float
    """Labels that were the largest logit (percent)."""
    topk_accuracy: float
    """Labels among the ``topk`` largest logits (percent)."""
    count: int
    """Labels counted: neither ignored nor invalid."""
    invalid: int
    """Labels out of range, left out (only on CUDA, where they cannot be an error)."""
    per_class_accuracy: tuple[float, ...] | None
    """Percent for each class, NaN for absent ones; None unless kept."""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


class MetricsAccumulator:
    """Metrics of any number of batches, kept in one small tensor on the device until they are read.

    Args:
        num_classes: number of logits per label.
        device: where the batches are.
        ignore_index: labels with this value are left out.
        topk: how many of the largest logits count for the top-k accuracy.
        per_class: whether to keep counts for each class.

    Attributes:
        values: the float64 accumulator. Sums of several processes' add up: ``all_reduce(values)`` is all it
        takes.

    Raises:
        ValueError: ``num_classes`` or ``topk`` is not positive.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        device: torch.device | str = "cpu",
        ignore_index: int = -100,
        topk: int = 5,
        per_class: bool = True,
    ) -> None:
        for name, value in (("num_classes", num_classes), ("topk", topk)):
            if value < 1:
                raise ValueError(f"tolaria.MetricsAccumulator: {name}: expected at least 1, got {value}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.topk = topk
        size = len(MetricsField) + (2 * num_classes if per_class else 0)
        self.values = torch.zeros(size, dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch; arguments and errors are those of :func:`classification_metrics_`."""
        classification_metrics_(self.values, logits, labels, self.ignore_index, self.topk)

    def reset(self) -> None:
        """Forget every batch."""
        self.values.zero_()

    def compute(self) -> ClassificationMetrics:
        """Read the device, in one transfer, and make the means."""
        values: list[float] = self.values.tolist()  # sync: the one transfer
        count = values[MetricsField.COUNT]
        per_class = None
        if len(values) > len(MetricsField):
            middle = len(MetricsField) + self.num_classes
            pairs = zip(values[len(MetricsField) : middle], values[middle:], strict=True)
            per_class = tuple(_percent(hits, total) for hits, total in pairs)
        return ClassificationMetrics(
            loss=values[MetricsField.LOSS_SUM] / count if count else math.nan,
            accuracy=_percent(values[MetricsField.CORRECT], count),
            topk_accuracy=_percent(values[MetricsField.TOPK_CORRECT], count),
            count=int(count),
            invalid=int(values[MetricsField.INVALID]),
            per_class_accuracy=per_class,
        )


def _percent(hits: float, total: float) -> float:
    return 100.0 * hits / total if total else math.nan
