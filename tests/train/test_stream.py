"""A place in the data is found again, whatever the loader can say of itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from tolaria.tasks import TensorBatches
from tolaria.tasks.data import Batch, Batches, WindowBatches
from tolaria.train.stream import BatchStream


class Plain:
    """A loader without state_dict, whose epochs differ from each other but not from run to run."""

    def __init__(self) -> None:
        self._inner = rows()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._inner)

    def __len__(self) -> int:
        return len(self._inner)


def rows() -> TensorBatches:
    return TensorBatches(torch.arange(23), torch.arange(23), 4, shuffle=True, rng_seed=5)


def windows() -> WindowBatches:
    return WindowBatches(torch.arange(60), 5, 3, shuffle=True, rng_seed=5)


@pytest.mark.parametrize("make", [rows, windows, Plain])
@pytest.mark.parametrize("taken", [0, 1, 6, 11, 12, 13, 31])
def test_batches_go_on_after_a_place(make: type[Batches], taken: int) -> None:
    whole = BatchStream(make())
    for _ in itertools.islice(whole, taken):
        pass
    other = BatchStream(make())
    other.go_to(whole.place())
    for _ in range(15):  # more than two epochs
        assert torch.equal(next(other)[0], next(whole)[0])
    assert {**whole.place(), "order": None} == {**other.place(), "order": None}


def test_a_smaller_epoch_is_refused() -> None:
    stream = BatchStream(rows())
    for _ in itertools.islice(stream, 5):
        pass
    other = BatchStream(TensorBatches(torch.arange(8), torch.arange(8), 4, shuffle=True, rng_seed=5))
    with pytest.raises(ValueError, match=r"expected 5 batches or more in an epoch, .* got 2"):
        other.go_to(stream.place())
