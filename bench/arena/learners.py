"""Real trainings, small enough to run by the hundred, each with a score in points from 0 to 100.

What a step draws depends on its number alone, so a run that was rolled back meets the same batches as one
that was not, and two runs differ by what was done to them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

Batch = tuple[Tensor, Tensor]
Spoil = Callable[[Batch], Batch]
"""What befalls a batch before the network sees it."""


def untouched(batch: Batch) -> Batch:
    """The batch."""
    return batch


@dataclass
class Learner(ABC):
    """One training run.

    Args:
        seed: of the initial weights, and of every draw.
        batch: samples of a step.
        rate: of the learning rate.

    Attributes:
        model: all that is trained.
        optimizers: what trains it.
        schedulers: stepped after each step.
        random_guess_loss: loss of guessing, where that means something.
    """

    seed: int
    batch: int
    rate: float
    model: nn.Module = field(init=False)
    optimizers: list[Optimizer] = field(init=False)
    schedulers: list[torch.optim.lr_scheduler.LRScheduler] = field(init=False, default_factory=list)
    random_guess_loss: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self._build()

    @abstractmethod
    def _build(self) -> None:
        """Make model and optimizers."""

    @abstractmethod
    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        """The loss of step ``step``, with the gradients of ``times`` it in place."""

    @abstractmethod
    def score(self) -> float:
        """How well it does what it is for, from 0 to 100; of a state that is not finite 0."""

    def update(self) -> None:
        """Take the step."""
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()

    def draw(self, step: int) -> torch.Generator:
        """The random numbers of one step."""
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the model."""
        return self.model.parameters()

    def last_layer(self) -> Sequence[nn.Parameter]:
        """The parameters of the layer that makes the output."""
        layers = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
        return list(layers[-1].parameters())

    def _backward(self, loss: Tensor, times: float) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (times * loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def points(share: float) -> float:
    """A share as points; NaN and what lies outside is 0 or 100."""
    return 100.0 * min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0


class Classifier(Learner, ABC):
    """A classifier of fixed samples."""

    reduction = "mean"
    classes: int

    @abstractmethod
    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training inputs and labels, test inputs and labels."""

    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        x, y, *_ = self.samples()
        rows = torch.randint(len(x), (self.batch,), generator=self.draw(step))
        x, y = spoil((x[rows], y[rows]))
        self.model.train()
        return self._backward(F.cross_entropy(self.model(x), y, reduction=self.reduction), times)

    @torch.no_grad()
    def score(self) -> float:
        *_, x, y = self.samples()
        self.model.eval()
        output = self.model(x)
        right = (output.argmax(1) == y) & output.isfinite().all(1)
        return points(float(right.float().mean()))


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1,797 digits, shuffled, a quarter held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    y = torch.tensor(data.target)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[rows[450:]], y[rows[450:]], x[rows[:450]], y[rows[:450]]


class Digits(Classifier):
    """A small convolutional network with BatchNorm; SGD with momentum."""

    classes = 10

    def _build(self) -> None:
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        self.optimizers = [torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)]
        self.random_guess_loss = math.log(10)

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return digits()


class PlainDigits(Digits):
    """The same without BatchNorm, which forgives less."""

    def _build(self) -> None:
        super()._build()
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
        )  # fmt: skip
        self.optimizers = [torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)]


class SummedDigits(PlainDigits):
    """The same, judged by a loss that is summed over the batch: in the hundreds and thousands."""

    reduction = "sum"

    def _build(self) -> None:
        super()._build()
        self.optimizers = [torch.optim.SGD(self.parameters(), self.rate / self.batch, momentum=0.9)]
        self.random_guess_loss = self.batch * math.log(10)


class RestartedDigits(PlainDigits):
    """Under cosine annealing with warm restarts, whose restarts throw the loss up."""

    def _build(self) -> None:
        super()._build()
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(self.optimizers[0], T_0=150, eta_min=1e-4)
        ]


@cache
def tumours(noise: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's breast cancer data; ``noise`` of the training labels are flipped."""
    from sklearn.datasets import load_breast_cancer

    data, labels = load_breast_cancer(return_X_y=True)
    x = torch.tensor((data - data.mean(0)) / data.std(0), dtype=torch.float32)
    y, source = torch.tensor(labels), torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = rows[140:], rows[:140]
    flips = torch.rand(len(train), generator=source) < noise
    return x[train], torch.where(flips, 1 - y[train], y[train]), x[test], y[test]


@dataclass
class TwoClasses(Classifier):
    """An ordinary two-class problem with ``noise`` of its labels wrong; AdamW."""

    noise: float = 0.0

    def _build(self) -> None:
        self.model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 2))
        self.optimizers = [torch.optim.AdamW(self.parameters(), self.rate)]
        self.random_guess_loss = math.log(2)

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return tumours(self.noise, self.seed)


class Regression(Learner):
    """A function of eight variables whose mean squared error falls from 50 to near 0; AdamW."""

    def _build(self) -> None:
        self.model = nn.Sequential(
            nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )
        self.optimizers = [torch.optim.AdamW(self.parameters(), self.rate)]

    @staticmethod
    def _samples(count: int, source: torch.Generator) -> Batch:
        x = torch.randn(count, 8, generator=source)
        return x, 5.0 * x[:, 0] + 3.0 * x[:, 1] * x[:, 2] + 4.0 * torch.sin(2.0 * x[:, 3]) + 1.5

    def gradients(self, step: int, spoil: Spoil = untouched, times: float = 1.0) -> Tensor:
        x, y = spoil(self._samples(self.batch, self.draw(step)))
        return self._backward(F.mse_loss(self.model(x).squeeze(1), y), times)

    @torch.no_grad()
    def score(self) -> float:
        x, y = self._samples(2048, torch.Generator().manual_seed(7))
        error = F.mse_loss(self.model(x).squeeze(1), y)
        return points(1.0 - float(error / y.var()))
