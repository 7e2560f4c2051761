"""Validation in the middle of an epoch: the epoch sees each sample once, whatever loads it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tolaria import GovernorConfig, TolariaGovernor, validate_and_get_metrics
from tolaria.data import SkipBatches
from tolaria.train.loaders import undisturbed

DATA = TensorDataset(torch.arange(32.0).view(32, 1).expand(32, 4).clone(), torch.zeros(32, dtype=torch.long))


def with_workers(persistent: bool = True, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    draw = torch.Generator().manual_seed(0)
    return DataLoader(
        DATA, batch_size=8, num_workers=1, persistent_workers=persistent, shuffle=shuffle, generator=draw
    )


class StartsOver:
    """A loader as people write it: its own iterator."""

    def __iter__(self) -> StartsOver:
        self.place = 0
        return self

    def __next__(self) -> tuple[Tensor, ...]:
        if self.place >= 32:
            raise StopIteration
        self.place += 8
        return DATA[self.place - 8 : self.place]


class Wrapper:
    """Somebody's wrapper around a loader."""

    def __init__(self, loader: object) -> None:
        self.inner = {"train": loader}

    def __iter__(self) -> Iterator[object]:
        return iter(self.inner["train"])  # type: ignore[call-overload,no-any-return]


def skipping() -> SkipBatches[tuple[Tensor, ...]]:
    model = nn.Linear(4, 2)
    governor = TolariaGovernor(
        model, torch.optim.SGD(model.parameters(), 0.1), config=GovernorConfig(skip_batches=1)
    )
    return SkipBatches(with_workers(), governor)


LOADERS = {
    "in the process": lambda: DataLoader(DATA, batch_size=8),
    "workers": lambda: with_workers(persistent=False),
    "persistent workers": with_workers,
    "persistent workers, shuffled": lambda: with_workers(shuffle=True),
    "wrapped": lambda: Wrapper(with_workers()),
    "skipping": skipping,
    "starts over": StartsOver,
}


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_epoch_under_way_goes_on(make, at):  # type: ignore[no-untyped-def]
    loader, model, seen = make(), nn.Linear(4, 2), []
    for index, (x, _) in enumerate(loader):
        seen += x[:, 0].int().tolist()
        if index == at:
            validate_and_get_metrics(
                model, loader, loader, nn.CrossEntropyLoss(), "cpu", num_classes=2, train_batches=2
            )
        assert index < 8
    assert sorted(seen) == list(range(32))


def test_persistent_workers_of_a_loader_that_only_validation_reads_stay() -> None:
    loader = with_workers()
    iterators = []
    for _ in range(2):
        with undisturbed(loader) as batches:
            assert len(list(batches)) == 4
        iterators.append(loader._iterator)
    assert iterators[0] is iterators[1] is not None
    assert len(list(loader)) == 4
    with undisturbed(loader) as batches:  # somebody has begun an epoch since
        assert len(list(batches)) == 4
        assert loader._iterator is not iterators[0]
    assert loader._iterator is iterators[0]


def test_one_shot_iterators_are_read_as_they_are() -> None:
    stream = iter(range(5))
    with undisturbed(stream) as batches:
        assert batches is stream
