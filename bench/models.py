"""Networks to train and to copy: digits' own CNN, a small transformer, a CNN of ResNet-18's shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tolaria.nn import create_host


class Block(nn.Module):
    """Two convolutions beside an identity, or beside a 1x1 convolution where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        is_same = before == width and stride == 1
        self.side = (
            nn.Identity()
            if is_same
            else nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.side(x))


class ResNet18(nn.Module):
    """62 parameters, 11.7 million weights, as in the paper; images of any size."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        widths = [64, 64, 128, 256, 512]
        self.blocks = nn.Sequential(
            *(
                block
                for a, b in itertools.pairwise(widths)
                for block in (Block(a, b, 1 if a == b else 2), Block(b, b, 1))
            )
        )
        self.head = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean(dim=(2, 3)))


@dataclass(frozen=True)
class Workload:
    """A network, what it is fed, and how its steps are timed."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    labels: Callable[[], Tensor]
    settling: int
    """Steps that a copy makes before its timed ones, when the caches still hold another copy's."""
    timed: int
    """Steps in a row that are timed."""
    rounds: int
    quick_rounds: int

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x).flatten(0, -2), y.flatten())


WORKLOADS = {
    "digits CNN": Workload(
        lambda: create_host("cnn", in_channels=1, num_classes=10, widths=(8, 16)),
        lambda: torch.randn(64, 1, 8, 8),
        lambda: torch.randint(10, (64,)),
        settling=2,
        timed=10,
        rounds=150,
        quick_rounds=20,
    ),
    "transformer": Workload(
        lambda: create_host("transformer", vocabulary=96, context=64, width=64, depth=2),
        lambda: torch.randint(96, (16, 64)),
        lambda: torch.randint(96, (16, 64)),
        settling=1,
        timed=4,
        rounds=100,
        quick_rounds=14,
    ),
    "resnet18": Workload(
        ResNet18,
        lambda: torch.randn(8, 3, 64, 64),
        lambda: torch.randint(1000, (8,)),
        settling=0,  # no cache holds a copy
        timed=1,
        rounds=50,
        quick_rounds=6,
    ),
}


class Trainee:
    """One copy of a workload: the same weights and batch whenever it is made."""

    def __init__(self, workload: Workload, device: str) -> None:
        torch.manual_seed(0)
        self.workload = workload
        self.model = workload.build().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device == "cuda")
        self.x, self.y = workload.inputs().to(device), workload.labels().to(device)

    def step(self) -> Tensor:
        """One optimizer step; its loss."""
        loss = self.workload.loss(self.model, self.x, self.y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()
