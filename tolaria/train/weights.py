"""How much a batch counts: by its samples, by its labelled tokens; known on the device, without waiting."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tolaria import ops
from tolaria.ops import MetricsField

_IGNORE = -100
_WEIGHTED = (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss)


def ignore_index_of(criterion: object) -> int:
    """The label that the criterion leaves out; ``functools.partial`` of a function is looked into."""
    found = _setting(criterion, "ignore_index", _IGNORE)
    return found if isinstance(found, int) else _IGNORE


def is_summed(criterion: object) -> bool:
    """Whether the criterion's loss is a sum over its samples, not a mean."""
    return _setting(criterion, "reduction", "mean") == "sum"


def count_and_correct(logits: Tensor, labels: Tensor, criterion: object) -> tuple[Tensor, Tensor | None]:
    """How many labels a batch's metrics count, and how many of them the logits guess right.

    Args:
        logits: (N, C) or (N, C, ...).
        labels: as the criterion takes them: integers (N,) or (N, ...), of which the ignored ones are left
            out, or numbers, of which each sample counts once.
        criterion: says which label is left out.

    Returns:
        Two 0-dim float64 on the device; the second None if the labels are no classes of the logits.
    """
    dim = min(logits.dim() - 1, 1)
    fits = dim >= 0 and logits.shape[:dim] + logits.shape[dim + 1 :] == labels.shape
    if fits and _are_classes(labels) and logits.is_floating_point() and logits.shape[dim]:
        if _function(criterion) not in _WEIGHTED:  # its integers may be no classes, which the op would refuse
            kept = labels != ignore_index_of(criterion)
            hits = kept & (logits.detach().argmax(dim) == labels)
            return kept.sum(dtype=torch.float64), hits.sum(dtype=torch.float64)
        values = torch.zeros(len(MetricsField), dtype=torch.float64, device=logits.device)
        ops.classification_metrics_(values, logits.detach(), labels, ignore_index_of(criterion), 1)
        return values[MetricsField.COUNT], values[MetricsField.CORRECT]
    if _are_classes(labels):
        return (labels != ignore_index_of(criterion)).sum(dtype=torch.float64), None
    is_distribution = labels.shape == logits.shape and labels.dim() > 2
    rows = labels.numel() // labels.shape[1] if is_distribution else labels.shape[0] if labels.dim() else 1
    return torch.full((), rows, dtype=torch.float64, device=labels.device), None


def weight_of_mean(labels: Tensor, criterion: object) -> Tensor:
    """How much a micro-batch's mean loss counts in the mean over the whole batch, up to a common factor.

    Args:
        labels: of the micro-batch.
        criterion: a mean over the labels that are not ignored; those of cross entropy with a ``weight`` count
            by the weight of their class.

    Returns:
        0-dim float64 on the labels' device.
    """
    if not _are_classes(labels):
        return torch.full((), max(labels.numel(), 1), dtype=torch.float64, device=labels.device)
    kept = labels != ignore_index_of(criterion)
    weight = _class_weights(criterion)
    if weight is None:
        return kept.sum(dtype=torch.float64)
    of_label = weight.to(labels.device, torch.float64).take(torch.where(kept, labels, 0).long())
    return torch.where(kept, of_label, 0.0).sum()


def _class_weights(criterion: object) -> Tensor | None:
    weight = _setting(criterion, "weight", None) if _function(criterion) in _WEIGHTED else None
    return weight if isinstance(weight, Tensor) else None


def _function(criterion: object) -> object:
    """What it is: a function, or the class of an object."""
    if isinstance(criterion, functools.partial):
        return criterion.func
    return criterion if inspect.isfunction(criterion) else type(criterion)


def _are_classes(labels: Tensor) -> bool:
    return labels.dtype is not torch.bool and not labels.is_floating_point() and not labels.is_complex()


def _setting(criterion: object, name: str, default: object) -> object:
    keywords = criterion.keywords if isinstance(criterion, functools.partial) else {}
    return keywords.get(name, getattr(criterion, name, default))
