"""What is broken: a model with its training loop's parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from tolaria.governor import GovernorConfig


@dataclass(slots=True)
class ChaosRun:
    """A model with everything that a plain training loop needs; build a fresh one for every run."""

    model: nn.Module
    """Inputs to logits."""
    optimizer: Optimizer
    """Over its parameters."""
    batches: Iterable[object]
    """``(inputs, targets)``; iterated again when it ends."""
    criterion: Callable[[Tensor, Tensor], Tensor]
    """Logits and targets to a 0-dim loss."""
    evaluate: Callable[[nn.Module], float]
    """The final score, higher is better: an accuracy in percent."""
    random_guess_loss: float | None = None
    """For the lobotomy rule; None: off."""
    task_type: Any = "classification"
    """``"lm"`` flattens tokens for the criterion."""
    max_grad_norm: float | None = 1.0
    """Clip the gradient's norm to this."""
    config: GovernorConfig = field(default_factory=lambda: GovernorConfig(snapshot_interval=50))
    """The governor's settings."""
