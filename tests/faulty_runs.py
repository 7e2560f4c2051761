"""What goes wrong in a run inside somebody's trainer, and what the state was before."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from trainers import same

NAN_FAULTS = ("loss", "gradient", "weight", "moment", "buffer")
FAULTS = (*NAN_FAULTS, "spike", "corrupted batch", "collapse", "large lr")


class Net(nn.Module):
    """A classifier of points, with a buffer that training moves. It returns what Transformers wants."""

    def __init__(self, features: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.num_classes = classes
        self.body = nn.Sequential(nn.Linear(features, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def points(n: int = 512, seed: int = 1) -> list[dict[str, Tensor]]:
    """Clouds of points, one for each of four classes."""
    draws = torch.Generator().manual_seed(seed)
    centres = 3.0 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 4, (n,), generator=draws)
    x = centres[labels] + torch.randn(n, 6, generator=draws)
    return [{"x": x[i], "labels": labels[i]} for i in range(n)]


class Fault:
    """One of ``FAULTS`` (or ``"none"``), which strikes at one step, counted from 1, or from there on a while.

    A trainer's test calls the methods where their names say.
    """

    def __init__(self, name: str, at: int = 60) -> None:
        self.name, self.at = name, at
        self._rates: list[float] = []

    def _strikes(self, name: str, step: int, steps: int = 1) -> bool:
        return self.name == name and self.at <= step < self.at + steps

    def batch(self, x: Tensor, step: int) -> Tensor:
        return x * 1e4 if self._strikes("corrupted batch", step, 3) else x

    def loss(self, loss: Tensor, step: int) -> Tensor:
        if self._strikes("loss", step):
            return loss * math.nan
        return loss * 1e4 if self._strikes("spike", step) else loss

    @torch.no_grad()
    def before_step(self, model: nn.Module, optimizer: Any, step: int) -> None:
        if self._strikes("gradient", step):
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
        if self._strikes("large lr", step, 2):
            self._rates = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] *= 1e4

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Any, step: int) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if self._strikes("weight", step):
            trained[0].view(-1)[0] = math.nan
        if self._strikes("moment", step):
            state = next(iter(optimizer.state.values()))
            moment = next(v for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)
            moment.view(-1)[0] = math.inf
        if self._strikes("buffer", step):
            next(b for b in model.buffers() if b.is_floating_point() and b.dim()).view(-1)[0] = math.nan
        if self._strikes("collapse", step):
            for p in trained[-2:]:
                p.zero_()
        if self._strikes("large lr", step, 2):
            for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate


class Recorder:
    """The state after each step, and whether a rollback has brought it back bit for bit."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self._model, self._optimizer = model, optimizer
        self.states = {0: self.now()}
        self.exact: list[bool] = []

    def now(self) -> dict[str, Any]:
        optimizers = self._optimizer if isinstance(self._optimizer, list) else [self._optimizer]
        return copy.deepcopy({
            "model": self._model.state_dict(),
            "optimizers": [optimizer.state_dict()["state"] for optimizer in optimizers],
        })  # fmt: skip

    def record(self, governor: Any) -> None:
        """Call it after each step that was judged, and after what may have verified the state."""
        state = self.now()
        if governor.rollback_count > len(self.exact):
            self.exact.append(same(state, self.states[governor.last_report.restored_step]))
        self.states[governor.step_count] = state
