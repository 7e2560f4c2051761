"""Other ways to watch a loss, each as ``step(loss)``: as people write it, and other packages' own releases.

None does what ``governor_step_`` does (several rules, the order to capture or to roll back, all without a
look at the value on the host); each answers the same question: is this loss still healthy?
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import torch
from torch import Tensor

WINDOW = 20
Step = Callable[[Tensor], object]


class HostGovernor:
    """As people write it: a deque of floats, the default rule."""

    def __init__(self) -> None:
        self.history: deque[float] = deque(maxlen=WINDOW)
        self.consecutive = 0

    def step(self, x: float) -> bool:
        if not math.isfinite(x):
            return True
        if len(self.history) >= 10:
            mean = sum(self.history) / len(self.history)
            std = math.sqrt(sum((y - mean) ** 2 for y in self.history) / len(self.history))
            if x > 10 and x > mean + 6 * std and x > 3 * mean:
                self.consecutive += 1
                return self.consecutive >= 2
        self.history.append(x)
        self.consecutive = 0
        return False


def lightning() -> Step:
    """SpikeDetection of lightning-fabric, and a stand-in for the Fabric it asks (one process, no barrier)."""
    from lightning_fabric.utilities.spike import SpikeDetection

    detector = SpikeDetection(window=WINDOW)
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        barrier=lambda: None,
        reduce_boolean_decision=lambda decision, all: decision,
    )
    fabric = SimpleNamespace(strategy=strategy, global_rank=0)
    count = 0

    def step(loss: Tensor) -> None:
        nonlocal count
        detector.on_train_batch_end(fabric, loss, None, count)
        count += 1

    return step


def ignite() -> Step:
    """TerminateOnNan of pytorch-ignite: looks for a non-finite output and for nothing else."""
    from ignite.handlers import TerminateOnNan

    handler = TerminateOnNan()
    logging.getLogger("ignite").setLevel(logging.ERROR)

    def step(loss: Tensor) -> None:
        handler(SimpleNamespace(state=SimpleNamespace(output=loss)))

    return step


def adwin() -> Step:
    """ADWIN of river: has the mean of an adaptive window changed?"""
    from river.drift import ADWIN

    detector = ADWIN()
    return lambda loss: detector.update(loss.item())


def page_hinkley() -> Step:
    """Page and Hinkley's test of river."""
    from river.drift import PageHinkley

    detector = PageHinkley()
    return lambda loss: detector.update(loss.item())


def trainpulse() -> Step:
    """The monitor of trainpulse: spikes, plateaus, NaN. It keeps every value."""
    from trainpulse import Monitor

    monitor = Monitor()
    count = 0

    def step(loss: Tensor) -> None:
        nonlocal count
        monitor.log("loss", count, loss.item())
        count += 1

    return step


DETECTORS: dict[str, Callable[[], Step]] = {
    "lightning SpikeDetection": lightning,
    "ignite TerminateOnNan": ignite,
    "river ADWIN": adwin,
    "river PageHinkley": page_hinkley,
    "trainpulse Monitor": trainpulse,
}


QUICK_ONES = ("lightning SpikeDetection", "trainpulse Monitor")
"""Those of ``--quick``: importing each of the others takes seconds."""


def found(names: Iterable[str], losses: list[Tensor]) -> tuple[dict[str, Step], dict[str, str]]:
    """The detectors of these names after they saw ``losses``; and why the others are not there."""
    ready: dict[str, Step] = {}
    missing = {name: "only in a full run" for name in DETECTORS if name not in names}
    missing["composer NaNMonitor"] = "not tried: mosaicml 0.32 wants an older torch (below 2.7.1)"
    for name in names:
        try:
            step = DETECTORS[name]()
            for loss in losses:
                step(loss)
        except ImportError as error:
            missing[name] = f"skipped: {error}; it comes with the extra [bench]"
        else:
            ready[name] = step
    return ready, missing
