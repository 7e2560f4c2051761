"""Small hosts and batches that the tests of the loops share."""

from __future__ import annotations

import torch
from torch import Tensor

from tolaria import MorphogeneticModel
from tolaria.nn import CNNHost, TransformerHost

Batches = list[tuple[Tensor, Tensor]]


def cnn(dropout: float = 0.2) -> MorphogeneticModel:
    """A CNN with dropout and batch norm, the same each time."""
    torch.manual_seed(1)
    host = CNNHost(widths=(6, 8), dropout=dropout)
    return MorphogeneticModel(host, example_input=torch.zeros(2, 1, 8, 8))


def transformer(dropout: float = 0.2) -> MorphogeneticModel:
    """A tied transformer with dropout, the same each time."""
    torch.manual_seed(1)
    host = TransformerHost(vocabulary=17, context=8, width=16, depth=2, heads=2, dropout=dropout)
    return MorphogeneticModel(host, example_input=torch.zeros(2, 8, dtype=torch.int64))


def image_batches(count: int, rows: int = 8) -> Batches:
    """Images with something to learn."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(10, (count, rows), generator=generator)
    images = torch.randn(count, rows, 1, 8, 8, generator=generator) + labels[:, :, None, None, None] * 0.3
    return list(zip(images, labels, strict=True))


def token_batches(count: int, rows: int = 8) -> Batches:
    """Sequences that count upwards, with noise."""
    generator = torch.Generator().manual_seed(2)
    starts = torch.randint(17, (count, rows, 1), generator=generator)
    tokens = (starts + torch.arange(9) * 3) % 17
    return [(each[:, :-1], each[:, 1:]) for each in tokens]
