"""Validation that leaves no trace: summed on the device, fetched once, modes and random streams put back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tolaria import ops
from tolaria.nn.device import validate_device
from tolaria.nn.nest import to_device
from tolaria.nn.randomness import preserve_random_state
from tolaria.ops import MetricsField
from tolaria.tasks.spec import TaskType
from tolaria.train import arguments
from tolaria.train.batch import call_model, for_criterion, split_batch
from tolaria.train.loaders import undisturbed
from tolaria.train.step import Criterion
from tolaria.train.weights import ignore_index_of, is_summed


class Metrics(NamedTuple):
    """What :func:`validate_and_get_metrics` found."""

    val_loss: float
    """Mean loss over the test loader, by sample (by token, ignored ones left out, for language models)."""
    val_accuracy: float
    """Percent."""
    train_loss: float
    """Mean loss over the first batches of the training loader; NaN if there were none."""
    train_accuracy: float
    """Percent."""
    per_class_acc: list[float] | None
    """Percent per class over the test loader, NaN for a class that does not occur; None unless asked for."""
    perplexity: float | None
    """exp(val_loss) in float64, may be inf; None unless the task is a language model."""


def validate_and_get_metrics(
    model: nn.Module,
    trainloader: Iterable[object],
    testloader: Iterable[object],
    criterion: Criterion,
    device: str | torch.device,
    compute_per_class: bool = False,
    num_classes: int = 10,
    task_type: TaskType = "classification",
    *,
    train_batches: int | None = 10,
    amp_dtype: torch.dtype | None = None,
) -> Metrics:
    """Loss and accuracy over ``testloader`` and over the first batches of ``trainloader``, in eval mode.

    The loss is ``criterion``'s own, computed by the fused op where that is plain cross entropy (unweighted,
    unsmoothed, mean); otherwise each batch's mean counts by its samples. Train/eval mode of every submodule
    and every random stream (torch's, CUDA's, Python's, numpy's, and generators that a DataLoader or its
    sampler owns) are left as found, and so is an epoch that is under way over either loader, with persistent
    workers, too. One transfer from the device, at the end.

    Args:
        model: inputs to logits (B, C), or (B, T, C) for language models.
        trainloader: any iterable of batches; a one-shot iterator loses the batches that are looked at.
        testloader: any iterable of batches.
        criterion: logits and targets to a loss.
        device: where the batches go.
        compute_per_class: whether accuracy per class is wanted.
        num_classes: length of ``per_class_acc``.
        task_type: ``"classification"`` or ``"lm"``.
        train_batches: how many training batches to look at; None: all of them, 0: none.
        amp_dtype: run forwards under autocast with this dtype.

    Returns:
        ``(val_loss, val_accuracy, train_loss, train_accuracy, per_class_acc, perplexity)``; a loader without
        a labelled sample gives NaN.

    Raises:
        ValueError: a bad option, or the model has more classes than ``num_classes`` and per-class figures are
            asked.
        TypeError: a batch of the wrong kind, or labels that are not integers.
    """
    arguments.check_task_type(task_type)
    arguments.check_model_and_criterion(model, criterion)
    arguments.check_loader("trainloader", trainloader)
    arguments.check_loader("testloader", testloader)
    arguments.check_count("num_classes", num_classes, 1)
    arguments.check_count("train_batches", train_batches, 0, optional=True)
    where = validate_device(device)
    generators = [*own_generators(trainloader), *own_generators(testloader)]
    autocast = torch.autocast(where.type, dtype=amp_dtype) if amp_dtype is not None else nullcontext()
    with preserve_random_state(*generators), eval_mode(model), torch.no_grad(), autocast:
        with undisturbed(testloader) as batches:
            test = _Tally(criterion, task_type).over(model, batches, where)
        with undisturbed(trainloader) as batches:
            few = itertools.islice(batches, train_batches) if train_batches != 0 else ()
            train = _Tally(criterion, task_type).over(model, few, where)
    test_sums, train_sums = _fetch(test, train)
    val_loss, val_accuracy = _mean_and_accuracy(test_sums)
    return Metrics(
        val_loss,
        val_accuracy,
        *_mean_and_accuracy(train_sums),
        per_class_acc=_per_class(test_sums, num_classes) if compute_per_class else None,
        perplexity=_perplexity(val_loss) if task_type == "lm" else None,
    )


def _per_class(sums: list[float], num_classes: int) -> list[float]:
    """Percent per class, NaN where there was none; classes that the model does not know are absent."""
    first = len(MetricsField)
    known = (len(sums) - first) // 2
    if known > num_classes:
        raise ValueError(
            f"num_classes: expected at least {known}, the classes that the model tells apart, "
            f"got {num_classes}"
        )
    correct, count = sums[first : first + known], sums[first + known :]
    shares = [100.0 * hits / n if n else math.nan for hits, n in zip(correct, count, strict=True)]
    return shares + [math.nan] * (num_classes - known)


class _Tally:
    """Sums over a loader, on the device."""

    def __init__(self, criterion: Criterion, task_type: TaskType) -> None:
        self.criterion, self.task_type = criterion, task_type
        self.ignore_index = ignore_index_of(criterion)
        self.is_plain = is_plain_cross_entropy(criterion)
        self.metrics: ops.MetricsAccumulator | None = None

    def over(self, model: nn.Module, loader: Iterable[object], device: torch.device) -> _Tally:
        """Take in every batch."""
        for batch in loader:
            inputs, targets = split_batch(batch)
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            self.add(*for_criterion(call_model(model, inputs), targets, self.task_type))
        return self

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in one batch: logits (N, C) or (N, C, ...), labels (N,) or (N, ...)."""
        classes = _class_labels(logits, labels)
        if self.metrics is None:
            self.metrics = ops.MetricsAccumulator(
                logits.shape[min(logits.dim() - 1, 1)], device=logits.device, ignore_index=self.ignore_index
            )
        if self.is_plain and classes is labels:  # the fused loss is that of labels, not of probabilities
            self.metrics.update(logits, classes)
            return
        before = self.metrics.values[MetricsField.LOSS_SUM].clone()
        self.metrics.update(logits, classes)
        loss = self.criterion(logits, labels).double()
        counted = (classes != self.ignore_index).sum()
        if loss.dim() or is_summed(self.criterion):
            share = loss.sum()
        else:  # selected, since the mean over nothing is NaN
            share = torch.where(counted > 0, loss * counted, 0.0)
        self.metrics.values[MetricsField.LOSS_SUM] = before + share


def _class_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Integer labels; those of probabilities or one-hot rows are their largest entries."""
    if not labels.is_floating_point():
        return labels
    if labels.shape == logits.shape and logits.dim() > 1 and logits.shape[1] > 1:
        return labels.argmax(dim=1)
    raise TypeError(
        "targets: expected integer labels, or probabilities of at least two classes in the logits' shape "
        f"{tuple(logits.shape)}, got {labels.dtype} of shape {tuple(labels.shape)}"
    )


def _fetch(*tallies: _Tally) -> list[list[float]]:
    """The sums of every tally, in one transfer; zeros for one that saw no batch."""
    held = [tally.metrics.values for tally in tallies if tally.metrics is not None]
    values = torch.cat(held).tolist() if held else []  # sync: the one transfer
    found = []
    for tally in tallies:
        size = 0 if tally.metrics is None else tally.metrics.values.numel()
        found.append(values[:size] or [0.0] * len(MetricsField))
        values = values[size:]
    return found


def _mean_and_accuracy(sums: list[float]) -> tuple[float, float]:
    count = sums[MetricsField.COUNT]
    if not count:
        return math.nan, math.nan
    return sums[MetricsField.LOSS_SUM] / count, 100.0 * sums[MetricsField.CORRECT] / count


def is_plain_cross_entropy(criterion: object) -> bool:
    """Whether ``criterion`` is what the fused op computes: cross entropy, unweighted, unsmoothed, mean."""
    return (
        type(criterion) is nn.CrossEntropyLoss
        and criterion.weight is None
        and criterion.label_smoothing == 0.0
        and criterion.reduction == "mean"
        and not criterion._forward_hooks
        and not criterion._forward_pre_hooks
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def own_generators(loader: object) -> list[torch.Generator]:
    """Generators that a DataLoader, its sampler or its batch sampler draws from."""
    samplers = (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None))
    inner = getattr(samplers[2], "sampler", None)
    found = [getattr(each, name, None) for each in (*samplers, inner) for name in ("generator", "_generator")]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every submodule's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
