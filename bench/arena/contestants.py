"""Who watches: our presets, other packages' releases, and rules as people write them.

A rule that only tells is wired as people wire it: state is copied every so many steps while it is quiet, and
at an alarm the last copy comes back. Copies are :class:`tolaria.Snapshot`, which is kinder than ``deepcopy``.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from arena.learners import Learner
from tolaria import GovernorConfig, Snapshot, TolariaGovernor, TrainingDivergedError
from tolaria.governor import RollbackEvent, VerdictEvent

COPY_EVERY = 20
"""Steps between two copies for rules that have none of their own."""


class Contestant(ABC):
    """Watches one run.

    Args:
        learner: the run.
        acts: whether it may change anything, or tells alone.

    Attributes:
        alarms: the steps at which it rolled back, or would have.
    """

    def __init__(self, learner: Learner, acts: bool) -> None:
        self.learner, self.acts = learner, acts
        self.alarms: list[int] = []
        self.gave_up = False

    def allows(self, step: int, loss: Tensor) -> bool:
        """Whether the optimizers may take the step; gradients are in place."""
        return True

    @abstractmethod
    def saw(self, step: int, loss: Tensor) -> None:
        """The step was taken, or left out."""

    def close(self) -> None:
        """The run is over."""
        return

    def clean_up(self) -> None:
        """Remove files and the like: once, also where the run has gone on in several processes."""
        return


class Ours(Contestant):
    """A governor."""

    def __init__(self, learner: Learner, acts: bool, config: GovernorConfig) -> None:
        super().__init__(learner, acts)
        self._governor = TolariaGovernor(
            learner.model, learner.optimizers, schedulers=learner.schedulers,
            config=replace(config, log_only=not acts),
            random_guess_loss=learner.random_guess_loss,
        )  # fmt: skip

    def saw(self, step: int, loss: Tensor) -> None:
        if self.gave_up:
            return
        try:
            self._governor.step(loss)
        except TrainingDivergedError:
            self.gave_up = True
        for event in self._governor.poll():
            told = isinstance(event, VerdictEvent) and event.rollback and not self.acts
            if told or (isinstance(event, RollbackEvent) and self.acts):
                self.alarms.append(step)

    def close(self) -> None:
        self._governor.close()


class Rule(Contestant):
    """A rule over the loss that only tells."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        super().__init__(learner, acts)
        self._copy = (
            Snapshot(learner.model, learner.optimizers, schedulers=learner.schedulers) if acts else None
        )
        if self._copy is not None:
            self._copy.capture()

    @abstractmethod
    def is_alarmed(self, step: int, loss: float) -> bool:
        """Whether this loss is one to roll back at."""

    def saw(self, step: int, loss: Tensor) -> None:
        alarmed = self.is_alarmed(step, float(loss))
        if alarmed:
            self.alarms.append(step)
        if self._copy is not None and alarmed:
            self._copy.restore()
        elif self._copy is not None and step % COPY_EVERY == COPY_EVERY - 1:
            self._copy.capture()


class ZScore(Rule):
    """Over three standard deviations above the mean of the last hundred losses, or not finite."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        super().__init__(learner, acts)
        self._last: deque[float] = deque(maxlen=100)

    def is_alarmed(self, step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        losses = torch.tensor(list(self._last), dtype=torch.float64)
        self._last.append(loss)
        return len(losses) >= 20 and loss > float(losses.mean() + 3.0 * losses.std())


class Ratio(Rule):
    """Over three times an exponential mean, or not finite."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        super().__init__(learner, acts)
        self._mean: float | None = None

    def is_alarmed(self, step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        mean = self._mean
        self._mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        return mean is not None and step >= 20 and loss > 3.0 * mean


class OnlyNaN(Rule):
    """Not finite: pytorch-ignite's TerminateOnNan and Lightning's detect_anomaly look for that alone."""

    def is_alarmed(self, step: int, loss: float) -> bool:
        return not math.isfinite(loss)


class TrainPulse(Rule):
    """The monitor of trainpulse: alerts of the critical kind."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        from trainpulse import Monitor

        super().__init__(learner, acts)
        self._monitor = Monitor()

    def is_alarmed(self, step: int, loss: float) -> bool:
        return any(alert.severity.name == "CRITICAL" for alert in self._monitor.log("loss", step, loss) or ())


class Arc(Contestant):
    """WeightRollback of arc-training, its defaults: it copies, rolls back and lowers the rate by itself."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        from arc.intervention.rollback import WeightRollback

        super().__init__(learner, acts)
        self._guard = WeightRollback(learner.model, learner.optimizers[0], verbose=False)

    def allows(self, step: int, loss: Tensor) -> bool:
        action = self._guard.step(loss)
        if action.rolled_back:
            self.alarms.append(step)
        return not action.should_skip

    def saw(self, step: int, loss: Tensor) -> None:
        return


class _Asked:
    """Stands in for an optimizer whose step the arena takes itself; remembers whether it was wanted."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer, self.wanted = optimizer, False

    def __getattr__(self, name: str) -> object:
        return getattr(self._optimizer, name)

    def step(self) -> None:
        self.wanted = True


class StabilityGuard(Contestant):
    """GuardedOptimizer of stabilityguard, its defaults, set to roll back: it copies at every step."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        from stabilityguard import GuardedOptimizer

        super().__init__(learner, acts)
        self._asked = _Asked(learner.optimizers[0])
        self._folder = tempfile.TemporaryDirectory(prefix="arena-")
        self._guard = GuardedOptimizer(
            self._asked, learner.model, nan_action="rollback", verbose=False, log_dir=self._folder.name
        )

    def allows(self, step: int, loss: Tensor) -> bool:
        self._asked.wanted = False
        with contextlib.redirect_stdout(None):
            self._guard.step(loss=float(loss))
        if not self._asked.wanted:
            self.alarms.append(step)
        return self._asked.wanted

    def saw(self, step: int, loss: Tensor) -> None:
        return

    def clean_up(self) -> None:
        self._guard.close()
        self._folder.cleanup()


class ZClip(Contestant):
    """ZClip of zclip, its defaults: it clips gradients and never goes back, so it has no alarms."""

    def __init__(self, learner: Learner, acts: bool) -> None:
        from zclip import ZClip as Clip

        super().__init__(learner, acts)
        self._clip = Clip()

    def allows(self, step: int, loss: Tensor) -> bool:
        self._clip.step(self.learner.model)
        return True

    def saw(self, step: int, loss: Tensor) -> None:
        return


PACKAGES = {
    "trainpulse": "trainpulse",
    "arc-training": "arc",
    "stabilityguard": "stabilityguard",
    "zclip": "zclip",
}
"""What is to be installed for whom, by the name that is imported."""

Make = Callable[[Learner, bool], Contestant]

CONTESTANTS: dict[str, Make] = {
    "GovernorConfig()": lambda learner, acts: Ours(learner, acts, GovernorConfig()),
    "GovernorConfig.balanced()": lambda learner, acts: Ours(learner, acts, GovernorConfig.balanced()),
    "GovernorConfig.classic()": lambda learner, acts: Ours(learner, acts, GovernorConfig.classic()),
    "GovernorConfig.strict()": lambda learner, acts: Ours(learner, acts, GovernorConfig.strict()),
    "z-score": ZScore,
    "3 x exponential mean": Ratio,
    "NaN alone": OnlyNaN,
    "trainpulse": TrainPulse,
    "arc-training": Arc,
    "stabilityguard": StabilityGuard,
    "zclip": ZClip,
}
