"""What there is in Lightning's trainer: losses, averages, loggers, the running results of an epoch."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tolaria._optional import require
from tolaria.errors import MissingDependencyError
from tolaria.governor import GovernorEvent
from tolaria.governor.batches import BatchDebt, BatchLedger
from tolaria.telemetry.scalars import scalars_of

_MOST = 8
"""States that are kept: on CUDA the host hears of a bad step some steps later."""


class _Kept(NamedTuple):
    value: Tensor
    size: Tensor | None
    of_step: Tensor | None


class TrainingResults:
    """What ``self.log`` has gathered in ``training_step``.

    Lightning adds each value to a running mean, by a new tensor: to keep the former one costs a reference.

    Args:
        epoch_loop: of the trainer's fit loop.
    """

    def __init__(self, epoch_loop: Any) -> None:  # noqa: ANN401  (Lightning's)
        self._epoch_loop = epoch_loop
        self._kept: deque[dict[str, _Kept]] = deque(maxlen=_MOST)

    def forget(self) -> None:
        """An epoch begins."""
        self._kept.clear()

    def keep(self) -> None:
        """As far as is known all is well: keep what there is. Nothing is copied, nothing waits."""
        self._kept.append({
            key: _Kept(metric.value, getattr(metric, "cumulated_batch_size", None), metric._forward_cache)
            for key, metric in self._epoch_loop._results.items()
            if metric.is_tensor and not metric.has_reset
        })  # fmt: skip

    def free(self) -> None:
        """Take away what is not finite: back to the last state kept that is, or to none."""
        for key, metric in self._epoch_loop._results.items():
            if metric.is_tensor and not _is_finite(metric.value, metric._forward_cache):
                self._put_back(key, metric)
            elif not metric.is_tensor and not _is_finite(*metric.value.metric_state.values()):
                metric.value.reset()

    def _put_back(self, key: str, metric: Any) -> None:  # noqa: ANN401  (Lightning's)
        for kept in reversed(self._kept):
            if key in kept and _is_finite(*kept[key][:1], kept[key].of_step):
                metric.value, size, metric._forward_cache = kept[key]
                if size is not None:
                    metric.cumulated_batch_size = size
                metric._computed = None
                return
        metric.reset()


def callback_class() -> type:
    """``Callback`` of the package that has been imported; where none was, of the one that is installed.

    Raises:
        MissingDependencyError: none is.
    """
    names = ("lightning.pytorch", "pytorch_lightning")
    for name in names:
        if name in sys.modules:
            return sys.modules[name].Callback  # type: ignore[no-any-return]
    try:
        package = require(names[0], feature="TolariaCallback", package="lightning", extra="lightning")
    except MissingDependencyError:
        package = require(names[1], feature="TolariaCallback", package="lightning", extra="lightning")
    return package.Callback  # type: ignore[no-any-return]


def averages_of(callbacks: Sequence[Any]) -> dict[str, nn.Module]:
    """Averages of the weights that callbacks keep (``EMAWeightAveraging``), by the callback's name."""
    found: dict[str, nn.Module] = {}
    for callback in callbacks:
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            found[f"{type(callback).__name__}{len(found) or ''}"] = average
    return found


def loss_of(outputs: object) -> Tensor | float | None:
    """The loss that ``training_step`` has returned, if it has."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if isinstance(loss, Tensor):
        return loss.detach() if loss.numel() == 1 and loss.is_floating_point() else None
    return loss if isinstance(loss, float) else None


def log(trainer: Any, event: GovernorEvent) -> None:  # noqa: ANN401  (Lightning's)
    """Hand the numbers of an event to the trainer's loggers, at its step."""
    scalars = scalars_of(event)
    for logger in trainer.loggers if scalars else ():
        logger.log_metrics(scalars, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def leave_out(fit_loop: Any, debt: BatchDebt, ledger: BatchLedger) -> None:  # noqa: ANN401  (Lightning's)
    """Drop the batches that are due, but not the last one, with which Lightning ends its epoch.

    Those that were dropped count as seen: by its count of them Lightning knows when to validate.

    Args:
        fit_loop: of the trainer.
        debt: what is due.
        ledger: the governor's.
    """
    fetcher, progress, dropped = fit_loop._data_fetcher, fit_loop.epoch_loop.batch_progress, 0
    while debt.due(ledger) and hasattr(fetcher, "batches") and not fetcher.done:
        if fetcher.length is not None and fetcher.length - fetcher.fetched < 2:
            break
        batch = next(fetcher)
        if fetcher.done:  # it was the last of a stream
            fetcher.batches.insert(0, batch)
            fetcher.done = False
            break
        dropped += 1
        if debt.drawn():
            debt.pay()
    for counts in (progress.total, progress.current):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + dropped)


def _is_finite(*values: object) -> bool:
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return all(bool(torch.isfinite(v).all()) for v in flat if isinstance(v, Tensor))
